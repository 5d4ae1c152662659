#include "weights_sync/call_limit.h"

#include <algorithm>

#include "absl/time/clock.h"

namespace lockstep {
namespace {

// Nothing tells of a client that is gone: it is asked.
constexpr absl::Duration kAsk = absl::Milliseconds(20);

}  // namespace

bool CallLimit::Await(absl::Mutex& mutex, const absl::Condition& condition) const {
  if (cancelled == nullptr) return mutex.AwaitWithDeadline(condition, deadline);
  while (!cancelled()) {
    if (mutex.AwaitWithDeadline(condition, std::min(deadline, absl::Now() + kAsk))) return !cancelled();
    if (absl::Now() >= deadline) return false;
  }
  return false;
}

absl::Status CallLimit::CheckClient() const {
  if (cancelled == nullptr || !cancelled()) return absl::OkStatus();
  return absl::CancelledError("the client is gone, or cancelled the call");
}

}  // namespace lockstep

// How long a call may wait for others: until its deadline, and only while its client waits for the answer.
#pragma once

#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace lockstep {

struct CallLimit {
  absl::Time deadline = absl::InfiniteFuture();
  // The client is gone; null: it never is. Asked with the mutex of Await() held.
  std::function<bool()> cancelled;

  // Until `condition`; false: not by the limit. Of a call that was cancelled false, also if the condition is true: what
  // it would do now, nobody wants any more.
  bool Await(absl::Mutex& mutex, const absl::Condition& condition) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  // CANCELLED, or OK.
  absl::Status CheckClient() const;
};

}  // namespace lockstep

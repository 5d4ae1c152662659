// An update's tensors, over NCCL: bucket by bucket (bucket_plan.h), as the sender announces them.
//
// A broadcast that waits for its sender holds multiprocessors, so a worker enters one only once the sender has said,
// over the call that it keeps open, that it is about to. That call also tells each side at once of the other's death.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "weights_sync/nccl_groups.h"
#include "weights_sync/update.h"

namespace lockstep {

// What the sender says meanwhile. Thread-safe.
class ReceiveSignal {
 public:
  // The first `buckets` are about to be broadcast.
  void Ready(int64_t buckets);
  void Cancel(absl::Status why);

  int64_t ready();
  absl::Status status();

 private:
  absl::Mutex mutex_;
  int64_t ready_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

struct NcclReceive {
  WeightVersion version;
  std::vector<int64_t> tensors;  // indices into the manifest, ascending; empty: all
  int64_t bucket_bytes = 0;      // at most the inbox's buffer_bytes()
  absl::Time deadline;
};

// Returns once all has arrived and counts as received. `begun` is called with the number of buckets when the worker
// could enter the first broadcast. One that is refused before it has the inbox changes nothing; any failure after that
// ends the communicator: the ranks are no longer at the same broadcast.
absl::Status ReceiveOverNccl(const NcclReceive& receive, WeightUpdate& update, NcclGroups::Member& member,
                             ReceiveSignal& signal, const std::function<void(int64_t)>& begun);

}  // namespace lockstep

// All requests that are in flight or kept for re-attaching, and the byte budgets they share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rollout/server/request_state.h"
#include "rollout/server/task_thread.h"
#include "rollout/worker/request.h"

namespace lockstep {

struct RegistryOptions {
  int64_t max_buffered_bytes = 0;
  int64_t max_retained_bytes = 0;
  absl::Duration reattach = absl::ZeroDuration();
};

// Thread-safe. Outlives the worker (which holds its requests as sinks) and every reader. `tasks` is stopped before the
// registry is destroyed.
class RequestRegistry final : public RequestEvents {
 public:
  RequestRegistry(WorkerInterface* worker, const RegistryOptions& options, TaskThread* tasks);

  // ALREADY_EXISTS if the id is in flight or being read; a retained result of that id is dropped. RESOURCE_EXHAUSTED
  // while buffers are over budget. Sets the info's worker_id.
  absl::StatusOr<std::shared_ptr<RequestState>> Add(RequestInfo info);
  // Null if there is none.
  std::shared_ptr<RequestState> Find(const std::string& request_id) const;
  // Removes it, if it is still the one of its id.
  void Forget(const RequestState& state);

  // Ends a sample, or all, early. Whether it was in flight.
  bool Abort(RequestState& state, std::optional<int32_t> sample, AbortReason reason);
  // To be told when a request may have become due, or due earlier: then its samples end in time.
  void WatchDue(const RequestState& state);
  // A reader has ended or gone away: aborts and forgets what its request's policy says.
  void Detach(RequestState& state, const Reader* reader, RequestState::DetachReason reason);

  void Wake(std::weak_ptr<Reader> reader) override;
  void BytesGrew() override;

  // Sends to readers that are ready, cuts others and drops results until the budgets hold. Runs on the task thread.
  void Reclaim();
  // Ends the samples of requests that are due.
  void EndDue(absl::Time now);
  // Drops results that nobody came back for in time.
  void Expire(absl::Time now);

  int64_t buffered_bytes() const { return pools_.buffered; }
  int64_t retained_bytes() const { return pools_.retained; }
  int64_t size() const;
  const RegistryOptions& options() const { return options_; }

 private:
  std::vector<std::shared_ptr<RequestState>> Snapshot() const;
  void DropAndForget(RequestState& state);
  void SendEarly(const std::vector<std::shared_ptr<RequestState>>& states);
  void ReclaimBuffered(const std::vector<std::shared_ptr<RequestState>>& states);
  void ReclaimRetained(const std::vector<std::shared_ptr<RequestState>>& states);
  void ScheduleExpiry();
  void ScheduleDue(absl::Time due);

  WorkerInterface* const worker_;
  const RegistryOptions options_;
  TaskThread* const tasks_;
  BufferPools pools_;
  std::atomic<bool> reclaim_scheduled_{false};
  std::atomic<uint64_t> next_serial_{0};

  mutable absl::Mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<RequestState>> requests_ ABSL_GUARDED_BY(mutex_);
  absl::Time next_due_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();  // EndDue is scheduled for then
};

}  // namespace lockstep

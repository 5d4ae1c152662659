// Hands accepted requests to the worker: at once, or when the weights they ask for are there.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rollout/server/request_registry.h"
#include "rollout/server/task_thread.h"

namespace lockstep {

// Thread-safe. `tasks` is stopped before the starter is destroyed.
class RequestStarter {
 public:
  RequestStarter(WorkerInterface* worker, RequestRegistry* registry, TaskThread* tasks, absl::Duration max_version_wait,
                 int64_t max_waiting);

  // Attaches `reader` and submits, waiting for `min_version` first if need be (with at most max_waiting others);
  // failures end the request's stream. `arrival` is when its time budget began. NOT_FOUND: the request was aborted and
  // its id taken by another before it got here; nothing is attached or submitted.
  absl::Status Start(RequestSpec spec, std::shared_ptr<RequestState> state, std::weak_ptr<Reader> reader,
                     int64_t stream_interval, absl::Time deadline, std::optional<WeightVersion> min_version,
                     absl::Time arrival);
  // From now on requests end with UNAVAILABLE instead of starting; so do those that wait.
  void Drain();
  bool draining() const;
  int64_t waiting() const;

 private:
  struct Waiter {
    RequestSpec spec;
    std::shared_ptr<RequestState> state;
    WeightVersion min_version;
    absl::Time arrival;
  };
  void SubmitOrWait(RequestSpec spec, std::shared_ptr<RequestState> state, std::optional<WeightVersion> min_version,
                    absl::Time arrival);
  void Submit(RequestSpec spec, RequestState& state, std::shared_ptr<RequestState> sink, absl::Time arrival);
  void Fail(RequestState& state, absl::Status status);
  void Poll();

  WorkerInterface* const worker_;
  RequestRegistry* const registry_;
  TaskThread* const tasks_;
  const absl::Duration max_version_wait_;
  const int64_t max_waiting_;

  mutable absl::Mutex mutex_;
  std::vector<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
};

// How long a client should wait before it tries again after `status`, in milliseconds; 0: no hint.
int64_t RetryAfterMs(const absl::Status& status);

// What a new call gets from a draining worker.
absl::Status DrainingError();

}  // namespace lockstep

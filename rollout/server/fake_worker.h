// A worker without a model, for tests of the service: tokens are a hash of what they depend on, steps take as long as
// they are told to.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rollout/worker/make_worker.h"
#include "rollout/worker/request.h"

namespace lockstep {

struct FakeWorkerOptions {
  int64_t vocab_size = 1000;
  int64_t max_sequences = 64;
  int64_t max_waiting_sequences = 4096;
  int64_t prefill_tokens = 64;  // prompt tokens per step and sequence
  absl::Duration step = absl::Milliseconds(1);
  // From this long after construction on the weights are (0, 1) instead of (0, 0).
  absl::Duration next_version_after = absl::InfiniteDuration();
  // From this long after construction on no step ends.
  absl::Duration stuck_after = absl::InfiniteDuration();
  // From this long after construction on the device counts as failed; requests go on.
  absl::Duration failed_after = absl::InfiniteDuration();
};

class FakeWorker final : public WorkerInterface {
 public:
  explicit FakeWorker(const FakeWorkerOptions& options);
  ~FakeWorker() override;

  absl::Status Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink) override;
  void Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason) override;
  WorkerLoad Load() const override;
  absl::Status Health() const override;
  WeightVersion weight_version() const override;
  void Drain(absl::Time deadline) override;

 private:
  struct Request;
  struct Sequence;

  void Run();
  void Step(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Advance(Request& request, Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Prefill(Request& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Finish(Request& request, Sequence& sequence, SampleResult result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const FakeWorkerOptions options_;
  const absl::Time start_;
  mutable absl::Mutex mutex_;
  std::vector<std::unique_ptr<Request>> requests_ ABSL_GUARDED_BY(mutex_);  // in order of arrival
  WorkerLoad load_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// A model that the fake worker pretends to serve: model_type "fake", eos id 2, a context of 4,096 tokens.
ServingModel MakeFakeModel(const FakeWorkerOptions& options);

}  // namespace lockstep

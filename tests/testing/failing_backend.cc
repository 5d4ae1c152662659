#include "tests/testing/failing_backend.h"

#include <thread>
#include <utility>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "sampler/row_sampler.h"

namespace lockstep {
namespace {

class FailingOps final : public CpuOps {
 public:
  FailingOps(const NumericsProfile& profile, ThreadPool* threads, int steps)
      : CpuOps(profile, threads), steps_(steps) {}
  absl::Status status() override { return --steps_ >= 0 ? absl::OkStatus() : absl::InternalError(kDeviceFailure); }

 private:
  int steps_;
};

// Current by thread, as a CUDA device is.
class ThreadBoundOps final : public CpuOps {
 public:
  using CpuOps::CpuOps;
  absl::Status UseOnThisThread() override {
    thread_ = std::this_thread::get_id();
    return absl::OkStatus();
  }
  StepRows BeginStep(const StepBatch& batch) override {
    if (std::this_thread::get_id() != thread_) status_ = absl::InternalError(kOtherThread);
    return CpuOps::BeginStep(batch);
  }
  absl::Status status() override { return status_; }

 private:
  std::thread::id thread_ = std::this_thread::get_id();
  absl::Status status_;
};

class BlockingOps final : public CpuOps {
 public:
  BlockingOps(const NumericsProfile& profile, ThreadPool* threads, absl::Notification* released)
      : CpuOps(profile, threads), released_(*released) {}
  StepRows BeginStep(const StepBatch& batch) override {
    released_.WaitForNotification();
    return CpuOps::BeginStep(batch);
  }

 private:
  absl::Notification& released_;
};

template <class TestOps>
class TestBackend final : public Backend {
 public:
  template <class... Arguments>
  TestBackend(const NumericsProfile& profile, ThreadPool* threads, Arguments... arguments)
      : threads_(*threads), ops_(profile, threads, arguments...) {}
  std::string device() const override { return "a device that fails"; }
  Ops& ops() override { return ops_; }
  absl::StatusOr<double> MeasureBandwidth() override { return absl::InternalError(kDeviceFailure); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t, int64_t) override {
    return MakeCpuRowSampler(threads_);
  }

 private:
  ThreadPool& threads_;
  TestOps ops_;
};

class FailingSampler final : public RowSampler {
 public:
  FailingSampler(ThreadPool& threads, int steps) : rows_(MakeCpuRowSampler(threads)), steps_(steps) {}
  void Enqueue(Rows logits, std::span<const SampleTask> tasks) override { rows_->Enqueue(logits, tasks); }
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override {
    if (--steps_ < 0) return absl::ResourceExhaustedError(kSamplerFailure);
    return rows_->Collect();
  }

 private:
  std::unique_ptr<RowSampler> rows_;
  int steps_;
};

class NonFiniteSampler final : public RowSampler {
 public:
  NonFiniteSampler(ThreadPool& threads, int32_t forced_token)
      : rows_(MakeCpuRowSampler(threads)), forced_token_(forced_token) {}
  void Enqueue(Rows logits, std::span<const SampleTask> tasks) override {
    for (const SampleTask& t : tasks) fails_.push_back(t.task->forced && t.task->forced_token == forced_token_);
    rows_->Enqueue(logits, tasks);
  }
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override {
    auto results = rows_->Collect();
    for (size_t i = 0; i < fails_.size(); ++i) {
      if (fails_[i]) (*results)[i] = absl::InternalError(kNotFinite);
    }
    fails_.clear();
    return results;
  }

 private:
  std::unique_ptr<RowSampler> rows_;
  int32_t forced_token_;
  std::vector<bool> fails_;
};

// CpuOps under another sampler.
template <class Sampler, class Argument>
class SamplerBackend final : public Backend {
 public:
  SamplerBackend(const NumericsProfile& profile, ThreadPool* threads, Argument argument)
      : threads_(*threads), ops_(profile, threads), argument_(argument) {}
  std::string device() const override { return "a device whose sampler fails"; }
  Ops& ops() override { return ops_; }
  absl::StatusOr<double> MeasureBandwidth() override { return absl::UnimplementedError("not measured"); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t, int64_t) override {
    return std::make_unique<Sampler>(threads_, argument_);
  }

 private:
  ThreadPool& threads_;
  CpuOps ops_;
  Argument argument_;
};

}  // namespace

std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps) {
  return std::make_unique<TestBackend<FailingOps>>(profile, threads, steps);
}

std::unique_ptr<Backend> MakeThreadBoundBackend(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<TestBackend<ThreadBoundOps>>(profile, threads);
}

std::unique_ptr<Backend> MakeBlockingBackend(const NumericsProfile& profile, ThreadPool* threads,
                                             absl::Notification* released) {
  return std::make_unique<TestBackend<BlockingOps>>(profile, threads, released);
}

std::unique_ptr<Backend> MakeFailingSamplerBackend(const NumericsProfile& profile, ThreadPool* threads, int steps) {
  return std::make_unique<SamplerBackend<FailingSampler, int>>(profile, threads, steps);
}

std::unique_ptr<Backend> MakeNonFiniteBackend(const NumericsProfile& profile, ThreadPool* threads,
                                              int32_t forced_token) {
  return std::make_unique<SamplerBackend<NonFiniteSampler, int32_t>>(profile, threads, forced_token);
}

}  // namespace lockstep

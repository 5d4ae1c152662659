#include "tests/testing/failing_backend.h"

#include <thread>

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

template <class TestOps>
class TestBackend final : public Backend {
 public:
  template <class... Arguments>
  TestBackend(const NumericsProfile& profile, ThreadPool* threads, Arguments... arguments)
      : threads_(*threads), ops_(profile, threads, arguments...) {}
  std::string device() const override { return "a device that fails"; }
  Ops& ops() override { return ops_; }
  absl::StatusOr<double> MeasureBandwidth() override { return absl::InternalError(kDeviceFailure); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t) override { return MakeCpuRowSampler(threads_); }

 private:
  ThreadPool& threads_;
  TestOps ops_;
};

}  // namespace

std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps) {
  return std::make_unique<TestBackend<FailingOps>>(profile, threads, steps);
}

std::unique_ptr<Backend> MakeThreadBoundBackend(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<TestBackend<ThreadBoundOps>>(profile, threads);
}

}  // namespace lockstep

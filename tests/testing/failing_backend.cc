#include "tests/testing/failing_backend.h"

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

class FailingBackend final : public Backend {
 public:
  FailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps)
      : threads_(*threads), ops_(profile, threads, steps) {}
  std::string device() const override { return "a device that fails"; }
  Ops& ops() override { return ops_; }
  absl::StatusOr<double> MeasureBandwidth() override { return absl::InternalError(kDeviceFailure); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t) override { return MakeCpuRowSampler(threads_); }

 private:
  ThreadPool& threads_;
  FailingOps ops_;
};

}  // namespace

std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps) {
  return std::make_unique<FailingBackend>(profile, threads, steps);
}

}  // namespace lockstep

#include "tests/testing/idle_backend.h"

#include "kernels/cpu/cpu_ops.h"

namespace lockstep {
namespace {

class IdleOps final : public CpuOps {
 public:
  using CpuOps::CpuOps;
  bool runs_by_itself() const override { return true; }
  int64_t max_logit_rows() const override { return 256; }
  void Copy(std::byte*, const std::byte*, int64_t) override {}
  void RunStep(const void*, absl::FunctionRef<void()>) override {}
};

class IdleSampler final : public RowSampler {
 public:
  void Enqueue(Rows, std::span<const SampleTask> tasks) override {
    for (const SampleTask& task : tasks) {
      results_.push_back(SampledToken{.token = 1, .logprobs = {}});
      if (task.task->options->raw) results_.back()->logprobs.raw = 0.0f;
    }
  }
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override { return std::exchange(results_, {}); }

 private:
  std::vector<absl::StatusOr<SampledToken>> results_;
};

class IdleBackend final : public Backend {
 public:
  IdleBackend(const NumericsProfile& profile, ThreadPool* threads) : ops_(profile, threads) {}
  std::string device() const override { return "a device that computes nothing"; }
  Ops& ops() override { return ops_; }
  absl::StatusOr<double> MeasureBandwidth() override { return absl::UnimplementedError("it has no memory"); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t, int64_t) override {
    return std::make_unique<IdleSampler>();
  }

 private:
  IdleOps ops_;
};

}  // namespace

std::unique_ptr<Backend> MakeIdleBackend(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<IdleBackend>(profile, threads);
}

}  // namespace lockstep

#include <algorithm>
#include <chrono>
#include <vector>

#include "rollout/base/check.h"
#include "rollout/engine/backend.h"

namespace lockstep {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const NumericsProfile& profile, ThreadPool* threads)
      : threads_(*threads), ops_(MakeCpuOps(profile, threads)) {}

  std::string device() const override { return "CPU, " + std::to_string(threads_.threads()) + " threads"; }
  Ops& ops() override { return *ops_; }
  absl::StatusOr<double> MeasureBandwidth() override;
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t, int64_t) override {
    return MakeCpuRowSampler(threads_);
  }

 private:
  ThreadPool& threads_;
  std::unique_ptr<Ops> ops_;
};

// The best of several passes over a buffer far larger than the caches.
absl::StatusOr<double> CpuBackend::MeasureBandwidth() {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kBytes = int64_t{1} << 29;
  const std::vector<uint64_t> buffer(kBytes / 8, 1);
  std::vector<uint64_t> sums(threads_.threads(), 0);
  double best = 0;
  constexpr int kPasses = 5;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = Clock::now();
    threads_.ParallelFor(static_cast<int64_t>(buffer.size()), 1 << 17, [&](int64_t begin, int64_t end, int thread) {
      // Independent sums, so that the loop waits for memory and not for additions.
      uint64_t s[8] = {};
      for (int64_t i = begin; i < end; i += 8) {
        for (int j = 0; j < 8; ++j) s[j] += buffer[i + j];
      }
      for (uint64_t x : s) sums[thread] += x;
    });
    best = std::max(best, static_cast<double>(kBytes) / std::chrono::duration<double>(Clock::now() - start).count());
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  LOCKSTEP_CHECK(total == kPasses * buffer.size(), "the bandwidth loop was optimised away");
  return best;
}

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<CpuBackend>(profile, threads);
}

}  // namespace lockstep

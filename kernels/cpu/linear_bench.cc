// linear_bench [threads] [seconds per measurement] [instruction set, as Highway names it]: the linear layer beside the
// two ceilings of this machine, measured here: the rate of fused multiply-adds out of registers and the rate of reading
// memory. Prints GFLOP/s = 2 M N K / time and GB/s = weight bytes / time. "cold": weights rotate through more memory
// than the last-level cache, as the layers of a model do.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_bench.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/simd_util-inl.h"
#include "rollout/base/check.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

constexpr int kChains = 10;

// `count` rounds of kChains independent vector fused multiply-adds; the result keeps the compiler from dropping them.
float FmaLoop(int64_t count) {
  const DF df;
  VF sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = hn::Set(df, static_cast<float>(i));
  const VF a = hn::Set(df, 0.999f);
  const VF b = hn::Set(df, 0.001f);
  for (int64_t n = 0; n < count; ++n) {
    HWY_UNROLL(10) for (int i = 0; i < kChains; ++i) sums[i] = hn::MulAdd(sums[i], a, b);
  }
  VF total = hn::Zero(df);
  for (int i = 0; i < kChains; ++i) total = hn::Add(total, sums[i]);
  return TreeSum(df, total);
}

int64_t FmaLoopFlops() {
  return int64_t{2} * kChains * static_cast<int64_t>(kLanes);
}

// Reads `count` floats (a multiple of 128), 8 accumulators.
float ReadLoop(const float* HWY_RESTRICT from, int64_t count) {
  const DF df;
  VF sums[8];
  for (VF& s : sums) s = hn::Zero(df);
  for (int64_t i = 0; i < count; i += 8 * static_cast<int64_t>(kLanes)) {
    HWY_UNROLL(8) for (int j = 0; j < 8; ++j) sums[j] = hn::Add(sums[j], hn::LoadU(df, from + i + j * kLanes));
  }
  VF total = hn::Zero(df);
  for (const VF& s : sums) total = hn::Add(total, s);
  return TreeSum(df, total);
}

const char* TargetOfThis() {
  return hwy::TargetName(HWY_TARGET);
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
namespace {

HWY_EXPORT(FmaLoop);
HWY_EXPORT(FmaLoopFlops);
HWY_EXPORT(ReadLoop);
HWY_EXPORT(TargetOfThis);

volatile float g_sink;

// Best of the runs that fit in `seconds`, at least three: other programs only ever make it slower.
template <class Fn>
double BestSeconds(double seconds, Fn fn) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  double total = 0;
  for (int i = 0; i < 3 || total < seconds; ++i) {
    const auto start = Clock::now();
    fn();
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::min(best, took);
    total += took;
  }
  return best;
}

struct Ceilings {
  double gflops = 0;
  double gbytes = 0;
};

Ceilings MeasureCeilings(ThreadPool& pool, double seconds) {
  const int threads = pool.threads();
  constexpr int64_t kRounds = int64_t{1} << 18;
  const double fma = BestSeconds(seconds, [&] {
    pool.ParallelFor(threads, 1, [&](int64_t, int64_t, int) { g_sink = HWY_DYNAMIC_DISPATCH(FmaLoop)(kRounds); });
  });
  constexpr int64_t kFloats = int64_t{64} << 20;  // 256 MiB
  constexpr int64_t kPart = int64_t{1} << 18;
  AlignedBuffer buffer(kFloats * sizeof(float));
  float* data = reinterpret_cast<float*>(buffer.data());
  std::fill_n(data, kFloats, 1.0f);
  const double read = BestSeconds(seconds, [&] {
    pool.ParallelFor(kFloats / kPart, 1, [&](int64_t begin, int64_t, int) {
      g_sink = HWY_DYNAMIC_DISPATCH(ReadLoop)(data + begin * kPart, kPart);
    });
  });
  return {.gflops = static_cast<double>(HWY_DYNAMIC_DISPATCH(FmaLoopFlops)() * kRounds * threads) / fma * 1e-9,
          .gbytes = static_cast<double>(kFloats * sizeof(float)) / read * 1e-9};
}

void BenchShape(const CpuContext& ctx, int64_t n, int64_t k, std::span<const int64_t> row_counts, bool cold,
                double seconds, const Ceilings& ceilings) {
  std::vector<uint16_t> source(n * k);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint16_t>(0x3C00 + i * 2654435761u % 512);
  const HostMatrix matrix{source.data(), n, k, DType::kBF16};
  const int64_t bytes = n * k * 2;
  const int64_t copies = cold ? std::max<int64_t>(1, (int64_t{192} << 20) / bytes) : 1;
  std::vector<std::unique_ptr<LinearWeight>> weights;
  for (int64_t i = 0; i < copies; ++i) weights.push_back(CpuPackLinear(ctx, {&matrix, 1}));
  const int64_t max_rows = *std::max_element(row_counts.begin(), row_counts.end());
  std::vector<float> x(max_rows * k, 0.5f);
  std::vector<float> out(max_rows * n);
  for (const int64_t m : row_counts) {
    const int64_t calls = cold ? copies : std::max<int64_t>(1, (int64_t{1} << 28) / (m * n * k));
    const double took =
        BestSeconds(seconds,
                    [&] {
                      for (int64_t i = 0; i < calls; ++i) {
                        CpuLinear(ctx, {x.data(), m, k, k}, *weights[i % copies], {out.data(), m, n, n});
                      }
                    }) /
        static_cast<double>(calls);
    const double gflops = 2e-9 * static_cast<double>(m * n * k) / took;
    const double gbytes = 1e-9 * static_cast<double>(bytes) / took;
    std::printf("%5ld %6ld %6ld %5s %10.1f %9.1f %5.1f%% %8.1f %5.1f%%\n", m, n, k, cold ? "cold" : "hot", took * 1e6,
                gflops, 100 * gflops / ceilings.gflops, gbytes, 100 * gbytes / ceilings.gbytes);
  }
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  using namespace lockstep;
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.3;
  int64_t target = 0;  // the best one
  std::string known;
  for (const int64_t t : hwy::SupportedAndGeneratedTargets()) {
    if (argc > 3 && std::string(argv[3]) == hwy::TargetName(t)) target = t;
    known += std::string(" ") + hwy::TargetName(t);
  }
  if (threads < 1 || !(seconds > 0) || (argc > 3 && target == 0)) {
    std::fprintf(stderr, "usage: linear_bench [threads >= 1] [seconds per measurement > 0] [one of:%s]\n",
                 known.c_str());
    return 2;
  }
  hwy::SetSupportedTargetsForTest(target);
  const NumericsProfile profile = FindNumericsProfile("hf-torch").value();
  ThreadPool pool(threads);
  ThreadScratch scratch(threads);
  const CpuContext ctx{profile, pool, scratch};
  const Ceilings ceilings = MeasureCeilings(pool, seconds);
  std::printf("%s, %d threads; ceilings measured here: %.1f GFLOP/s fp32 FMA, %.1f GB/s reading\n",
              HWY_DYNAMIC_DISPATCH(TargetOfThis)(), threads, ceilings.gflops, ceilings.gbytes);
  std::printf("%5s %6s %6s %5s %10s %9s %6s %8s %6s\n", "M", "N", "K", "", "us", "GFLOP/s", "peak", "GB/s", "peak");
  const int64_t large_rows[] = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512};
  BenchShape(ctx, 11008, 3840, large_rows, true, seconds, ceilings);
  BenchShape(ctx, 3840, 11008, large_rows, true, seconds, ceilings);
  BenchShape(ctx, 3840, 3840, large_rows, true, seconds, ceilings);
  BenchShape(ctx, 1024, 1024, large_rows, true, seconds, ceilings);
  const int64_t small_rows[] = {1, 2, 4, 8, 16, 32, 64};
  BenchShape(ctx, 512, 256, small_rows, false, seconds, ceilings);
  BenchShape(ctx, 1536, 256, small_rows, false, seconds, ceilings);
  BenchShape(ctx, 256, 768, small_rows, false, seconds, ceilings);
  BenchShape(ctx, 30, 3840, small_rows, false, seconds, ceilings);
  return 0;
}
#endif  // HWY_ONCE

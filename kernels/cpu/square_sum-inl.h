// The sum of a row's squares in the profile's order. Compiled once per target; no vector width shows in the bits.
#if defined(LOCKSTEP_KERNELS_CPU_SQUARE_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LOCKSTEP_KERNELS_CPU_SQUARE_SUM_INL_H_
#undef LOCKSTEP_KERNELS_CPU_SQUARE_SUM_INL_H_
#else
#define LOCKSTEP_KERNELS_CPU_SQUARE_SUM_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"
#include "kernels/numerics.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// PyTorch's row sum (ATen/native/cpu/SumKernel.cpp, PyTorch 2.13) of squares rounded to fp32, for rows of 8 elements
// and more: 4 accumulators of 8 lanes, here 32 lanes side by side, lane i % 32 taking element i. After 16 steps they
// move to the next of four levels, after 16 such moves to the one above, which bounds the error of long rows. At the
// end: the levels from below; what is left in eights into the first accumulator; the accumulators in order; the last
// elements one by one, and to them the 8 lanes in order.
HWY_INLINE float TorchSquareSum(const float* HWY_RESTRICT x, int64_t count) {
  const DF df;
  constexpr int64_t kSumLanes = 32;
  constexpr int64_t kLevelSteps = 16;
  constexpr int kParts = static_cast<int>(kSumLanes / static_cast<int64_t>(kLanes));
  HWY_ALIGN float lanes[kSumLanes];
  HWY_ALIGN float upper[3][kSumLanes];
  VF sum[kParts];
  HWY_UNROLL(8) for (int part = 0; part < kParts; ++part) sum[part] = hn::Zero(df);
  const auto add_step = [&](const float* from) {
    HWY_UNROLL(8) for (int part = 0; part < kParts; ++part) {
      const VF v = hn::LoadU(df, from + part * kLanes);
      sum[part] = hn::Add(sum[part], hn::Mul(v, v));
    }
  };
  const int64_t steps = count / kSumLanes;
  const bool cascades = steps >= kLevelSteps;
  if (cascades) {
    for (auto& level : upper) {
      for (float& lane : level) lane = 0.0f;
    }
  }
  int64_t i = 0;
  while (i + kLevelSteps <= steps) {
    for (const int64_t end = i + kLevelSteps; i < end; ++i) add_step(x + i * kSumLanes);
    for (int part = 0; part < kParts; ++part) {
      float* to = upper[0] + part * kLanes;
      hn::Store(hn::Add(hn::Load(df, to), sum[part]), df, to);
      sum[part] = hn::Zero(df);
    }
    for (int level = 1; level < 3 && (i >> (4 * level)) % kLevelSteps == 0; ++level) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) {
        upper[level][lane] += upper[level - 1][lane];
        upper[level - 1][lane] = 0.0f;
      }
    }
  }
  for (; i < steps; ++i) add_step(x + i * kSumLanes);
  HWY_UNROLL(8) for (int part = 0; part < kParts; ++part) hn::Store(sum[part], df, lanes + part * kLanes);
  if (cascades) {
    for (const auto& level : upper) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += level[lane];
    }
  }
  int64_t element = steps * kSumLanes;
  for (; element + 8 <= count; element += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += x[element + lane] * x[element + lane];
  }
  for (int64_t accumulator = 8; accumulator < kSumLanes; accumulator += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += lanes[accumulator + lane];
  }
  float total = 0.0f;
  for (; element < count; ++element) total += x[element] * x[element];
  for (int64_t lane = 0; lane < 8; ++lane) total += lanes[lane];
  return total;
}

HWY_INLINE float SumOfSquares(SquareSum order, const float* x, int64_t count) {
  return order == SquareSum::kTorchCpu ? TorchSquareSum(x, count) : Dot16(x, x, count);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

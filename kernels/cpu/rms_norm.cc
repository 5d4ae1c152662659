#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rms_norm.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include "kernels/cpu/rms_norm.h"

#include <cmath>

#include "hwy/highway.h"
#include "kernels/cpu/row_grain.h"
#include "kernels/cpu/simd_util-inl.h"
#include "kernels/cpu/square_sum-inl.h"
#include "rollout/base/check.h"

#ifndef LOCKSTEP_KERNELS_CPU_RMS_NORM_ONCE_
#define LOCKSTEP_KERNELS_CPU_RMS_NORM_ONCE_
namespace lockstep {

struct NormConfig {
  bool bf16;           // rounds norms to bf16
  bool bf16_residual;  // and the residual stream
  SquareSum square_sum;
  float eps;
};

}  // namespace lockstep
#endif

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// 1 / sqrt(mean(x^2) + eps), in fp32.
HWY_INLINE float InverseRms(const NormConfig& c, const float* x, int64_t width) {
  return 1.0f / std::sqrt(SumOfSquares(c.square_sum, x, width) / static_cast<float>(width) + c.eps);
}

// residual = round(residual + x).
template <bool kBf16>
void AddRow(const float* x, float* residual, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const VF sum = hn::Add(LoadUpTo(residual + i, width - i), LoadUpTo(x + i, width - i));
    StoreUpTo(RoundIf<kBf16>(sum), residual + i, width - i);
  }
}

// out = round((x * inverse) * weight). out may be x.
template <bool kBf16>
void ScaleRow(const float* x, float inverse, const float* weight, int64_t width, float* out) {
  const VF scale = hn::Set(DF(), inverse);
  for (int64_t i = 0; i < width; i += kLanes) {
    const VF scaled = hn::Mul(LoadUpTo(x + i, width - i), scale);
    StoreUpTo(RoundIf<kBf16>(hn::Mul(LoadUpTo(weight + i, width - i), scaled)), out + i, width - i);
  }
}

// residual = round(residual + round((x * inverse) * weight)).
template <bool kBf16, bool kBf16Residual>
void ScaleAddRow(const float* x, float inverse, const float* weight, int64_t width, float* residual) {
  const VF scale = hn::Set(DF(), inverse);
  for (int64_t i = 0; i < width; i += kLanes) {
    const VF scaled = hn::Mul(LoadUpTo(x + i, width - i), scale);
    const VF y = RoundIf<kBf16>(hn::Mul(LoadUpTo(weight + i, width - i), scaled));
    StoreUpTo(RoundIf<kBf16Residual>(hn::Add(LoadUpTo(residual + i, width - i), y)), residual + i, width - i);
  }
}

template <bool kBf16>
void RoundRow(const float* x, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += kLanes) StoreUpTo(RoundIf<kBf16>(LoadUpTo(x + i, width - i)), out + i, width - i);
}

template <bool kBf16>
void NormRows(const NormConfig& c, const Rows& x, const float* weight, const Rows& out) {
  for (int64_t r = 0; r < x.rows; ++r) {
    ScaleRow<kBf16>(x.row(r), InverseRms(c, x.row(r), x.width), weight, x.width, out.row(r));
  }
}

template <bool kBf16, bool kBf16Residual>
void AddNormRows(const NormConfig& c, const Rows& x, const Rows& residual, const float* weight, const Rows& out) {
  for (int64_t r = 0; r < x.rows; ++r) {
    float* sum = residual.row(r);
    AddRow<kBf16Residual>(x.row(r), sum, x.width);
    ScaleRow<kBf16>(sum, InverseRms(c, sum, x.width), weight, x.width, out.row(r));
  }
}

template <bool kBf16, bool kBf16Residual>
void NormAddRows(const NormConfig& c, const Rows& x, const float* weight, const Rows& residual) {
  for (int64_t r = 0; r < x.rows; ++r) {
    ScaleAddRow<kBf16, kBf16Residual>(x.row(r), InverseRms(c, x.row(r), x.width), weight, x.width, residual.row(r));
  }
}

template <bool kBf16>
void AddRows(const Rows& x, const Rows& residual) {
  for (int64_t r = 0; r < x.rows; ++r) AddRow<kBf16>(x.row(r), residual.row(r), x.width);
}

void RmsNorm(const NormConfig& c, const Rows& x, const float* weight, const Rows& out) {
  c.bf16 ? NormRows<true>(c, x, weight, out) : NormRows<false>(c, x, weight, out);
}
void AddRmsNorm(const NormConfig& c, const Rows& x, const Rows& residual, const float* weight, const Rows& out) {
  const auto rows =
      !c.bf16 ? AddNormRows<false, false> : (c.bf16_residual ? AddNormRows<true, true> : AddNormRows<true, false>);
  rows(c, x, residual, weight, out);
}
void RmsNormAdd(const NormConfig& c, const Rows& x, const float* weight, const Rows& residual) {
  const auto rows =
      !c.bf16 ? NormAddRows<false, false> : (c.bf16_residual ? NormAddRows<true, true> : NormAddRows<true, false>);
  rows(c, x, weight, residual);
}
void Add(bool bf16, const Rows& x, const Rows& residual) {
  bf16 ? AddRows<true>(x, residual) : AddRows<false>(x, residual);
}
void Round(bool bf16, const Rows& x, const Rows& out) {
  const auto row = bf16 ? RoundRow<true> : RoundRow<false>;
  for (int64_t r = 0; r < x.rows; ++r) row(x.row(r), x.width, out.row(r));
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
namespace {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(AddRmsNorm);
HWY_EXPORT(RmsNormAdd);
HWY_EXPORT(Add);
HWY_EXPORT(Round);

void CheckSameShape(const char* op, const Rows& a, const Rows& b) {
  LOCKSTEP_CHECK(a.rows == b.rows && a.width == b.width && a.width > 0, "{}: operands [{}, {}] and [{}, {}]", op,
                 a.rows, a.width, b.rows, b.width);
}

bool RoundsResidual(const CpuContext& ctx) {
  return ctx.profile.residual == DType::kBF16;
}

NormConfig Config(const CpuContext& ctx, float eps) {
  return {ctx.profile.activations == DType::kBF16, RoundsResidual(ctx), ctx.profile.square_sum, eps};
}

}  // namespace

void CpuRmsNorm(const CpuContext& ctx, Rows x, const float* weight, float eps, Rows out) {
  CheckSameShape("RmsNorm", x, out);
  const auto run = HWY_DYNAMIC_DISPATCH(RmsNorm);
  const NormConfig config = Config(ctx, eps);
  ctx.threads.ParallelFor(x.rows, RowGrain(x.width), [&](int64_t begin, int64_t end, int) {
    run(config, x.slice(begin, end - begin), weight, out.slice(begin, end - begin));
  });
}

void CpuAddRmsNorm(const CpuContext& ctx, Rows x, Rows residual, const float* weight, float eps, Rows out) {
  CheckSameShape("AddRmsNorm", x, residual);
  CheckSameShape("AddRmsNorm", x, out);
  const auto run = HWY_DYNAMIC_DISPATCH(AddRmsNorm);
  const NormConfig config = Config(ctx, eps);
  ctx.threads.ParallelFor(x.rows, RowGrain(x.width), [&](int64_t begin, int64_t end, int) {
    run(config, x.slice(begin, end - begin), residual.slice(begin, end - begin), weight, out.slice(begin, end - begin));
  });
}

void CpuRmsNormAdd(const CpuContext& ctx, Rows x, const float* weight, float eps, Rows residual) {
  CheckSameShape("RmsNormAdd", x, residual);
  const auto run = HWY_DYNAMIC_DISPATCH(RmsNormAdd);
  const NormConfig config = Config(ctx, eps);
  ctx.threads.ParallelFor(x.rows, RowGrain(x.width), [&](int64_t begin, int64_t end, int) {
    run(config, x.slice(begin, end - begin), weight, residual.slice(begin, end - begin));
  });
}

void CpuAdd(const CpuContext& ctx, Rows x, Rows residual) {
  CheckSameShape("Add", x, residual);
  const auto run = HWY_DYNAMIC_DISPATCH(Add);
  ctx.threads.ParallelFor(x.rows, RowGrain(x.width), [&](int64_t begin, int64_t end, int) {
    run(RoundsResidual(ctx), x.slice(begin, end - begin), residual.slice(begin, end - begin));
  });
}

void CpuRoundResidual(const CpuContext& ctx, Rows x, Rows out) {
  CheckSameShape("RoundResidual", x, out);
  const auto run = HWY_DYNAMIC_DISPATCH(Round);
  const bool bf16 = ctx.profile.activations == DType::kBF16;
  ctx.threads.ParallelFor(x.rows, RowGrain(x.width), [&](int64_t begin, int64_t end, int) {
    run(bf16, x.slice(begin, end - begin), out.slice(begin, end - begin));
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

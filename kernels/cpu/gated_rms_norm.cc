#include "kernels/cpu/gated_rms_norm.h"

#include <cmath>
#include <cstdint>

#include "rollout/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gated_rms_norm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"
#include "kernels/cpu/square_sum-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// kNormalised, kWeighted: round the first two steps too.
template <bool kBf16, bool kNormalised, bool kWeighted>
VF GatedNorm(VF x, VF gate, VF weight, VF factor) {
  const VF normalised = RoundIf<kNormalised>(hn::Mul(x, factor));
  const VF weighted = RoundIf<kWeighted>(hn::Mul(weight, normalised));
  return RoundIf<kBf16>(hn::Mul(weighted, Silu(gate)));
}

template <bool kBf16, bool kNormalised, bool kWeighted>
void Head(SquareSum order, const float* x, const float* gate, const float* weight, float eps, int64_t count,
          float* out) {
  const DF df;
  const float mean = SumOfSquares(order, x, count) / static_cast<float>(count);
  const VF factor = hn::Set(df, 1.0f / std::sqrt(mean + eps));
  int64_t i = 0;
  for (; i + static_cast<int64_t>(kLanes) <= count; i += kLanes) {
    const VF y = GatedNorm<kBf16, kNormalised, kWeighted>(hn::LoadU(df, x + i), hn::LoadU(df, gate + i),
                                                          hn::LoadU(df, weight + i), factor);
    hn::StoreU(y, df, out + i);
  }
  if (const int64_t left = count - i; left > 0) {
    const VF y = GatedNorm<kBf16, kNormalised, kWeighted>(LoadFirst(x + i, left), LoadFirst(gate + i, left),
                                                          LoadFirst(weight + i, left), factor);
    StoreFirst(y, out + i, left);
  }
}

void GatedRmsNormRowsImpl(const NumericsProfile& profile, Rows x, Rows gate, const float* weight, float eps,
                          int64_t head_dim, Rows out) {
  const bool bf16 = profile.activations == DType::kBF16;
  auto head = Head<false, false, false>;
  if (bf16) {
    switch (profile.gated_norm) {
      case GatedNormCasts::kThree:
        head = Head<true, true, true>;
        break;
      case GatedNormCasts::kTwo:
        head = Head<true, true, false>;
        break;
      case GatedNormCasts::kOne:
        head = Head<true, false, false>;
        break;
    }
  }
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t c = 0; c < x.width; c += head_dim)
      head(profile.square_sum, x.row(r) + c, gate.row(r) + c, weight, eps, head_dim, out.row(r) + c);
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(GatedRmsNormRowsImpl);

void CpuGatedRmsNorm(const CpuContext& ctx, Rows x, Rows gate, const float* weight, float eps, int64_t head_dim,
                     Rows out) {
  LOCKSTEP_CHECK(head_dim > 0 && x.width % head_dim == 0, "width {} is not a multiple of head_dim {}", x.width,
                 head_dim);
  LOCKSTEP_CHECK(gate.width == x.width && out.width == x.width && gate.rows == x.rows && out.rows == x.rows,
                 "x is [{}, {}], gate [{}, {}], out [{}, {}]", x.rows, x.width, gate.rows, gate.width, out.rows,
                 out.width);
  ctx.threads.ParallelFor(x.rows, 1, [&](int64_t begin, int64_t end, int) {
    const int64_t n = end - begin;
    HWY_DYNAMIC_DISPATCH(GatedRmsNormRowsImpl)
    (ctx.profile, x.slice(begin, n), gate.slice(begin, n), weight, eps, head_dim, out.slice(begin, n));
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

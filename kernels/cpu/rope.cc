// cos and sin of a row's angles are computed once for all heads, in fp64 lanes and rounded to fp32: correctly rounded
// but for cases too rare to meet, at any position, and the same bits on every machine (a C library's sinf is not).
#include "kernels/cpu/rope.h"

#include <cstdint>

#include "rollout/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

using DD = hn::Repartition<double, DF>;
using DHalf = hn::Rebind<float, DD>;
using VD = hn::Vec<DD>;
inline constexpr int64_t kDoubles = static_cast<int64_t>(kLanes) / 2;

// x = n pi/2 + r, |r| <= pi/4: pi/2 as two doubles, each product inside a fused multiply-add, so r is good to 2^-52 of
// itself for every fp32 x below 2^31.
void SinCos(VD x, VD* sin, VD* cos) {
  const DD dd;
  const VD n = hn::Round(hn::Mul(x, hn::Set(dd, 0x1.45f306dc9c883p-1)));
  VD r = hn::NegMulAdd(n, hn::Set(dd, 0x1.921fb54442d18p+0), x);
  r = hn::NegMulAdd(n, hn::Set(dd, 0x1.1a62633145c07p-54), r);
  const VD z = hn::Mul(r, r);
  // Taylor to r^15 and r^16: what is left out is below 2^-54.
  VD s = hn::Set(dd, -1.0 / 1307674368000.0);
  s = hn::MulAdd(s, z, hn::Set(dd, 1.0 / 6227020800.0));
  s = hn::MulAdd(s, z, hn::Set(dd, -1.0 / 39916800.0));
  s = hn::MulAdd(s, z, hn::Set(dd, 1.0 / 362880.0));
  s = hn::MulAdd(s, z, hn::Set(dd, -1.0 / 5040.0));
  s = hn::MulAdd(s, z, hn::Set(dd, 1.0 / 120.0));
  s = hn::MulAdd(s, z, hn::Set(dd, -1.0 / 6.0));
  s = hn::MulAdd(hn::Mul(s, z), r, r);
  VD c = hn::Set(dd, 1.0 / 20922789888000.0);
  c = hn::MulAdd(c, z, hn::Set(dd, -1.0 / 87178291200.0));
  c = hn::MulAdd(c, z, hn::Set(dd, 1.0 / 479001600.0));
  c = hn::MulAdd(c, z, hn::Set(dd, -1.0 / 3628800.0));
  c = hn::MulAdd(c, z, hn::Set(dd, 1.0 / 40320.0));
  c = hn::MulAdd(c, z, hn::Set(dd, -1.0 / 720.0));
  c = hn::MulAdd(c, z, hn::Set(dd, 1.0 / 24.0));
  c = hn::MulAdd(c, z, hn::Set(dd, -0.5));
  c = hn::MulAdd(c, z, hn::Set(dd, 1.0));
  // Quadrant n mod 4 in {0, 1, 2, 3}: odd ones swap sin and cos, 2 and 3 negate sin, 1 and 2 negate cos.
  const VD quadrant = hn::Sub(n, hn::Mul(hn::Set(dd, 4.0), hn::Floor(hn::Mul(n, hn::Set(dd, 0.25)))));
  const auto is1 = hn::Eq(quadrant, hn::Set(dd, 1.0));
  const auto is2 = hn::Eq(quadrant, hn::Set(dd, 2.0));
  const auto is3 = hn::Eq(quadrant, hn::Set(dd, 3.0));
  const auto swap = hn::Or(is1, is3);
  const VD s_or_c = hn::IfThenElse(swap, c, s);
  const VD c_or_s = hn::IfThenElse(swap, s, c);
  *sin = hn::IfThenElse(hn::Or(is2, is3), hn::Neg(s_or_c), s_or_c);
  *cos = hn::IfThenElse(hn::Or(is1, is2), hn::Neg(c_or_s), c_or_s);
}

// cos, sin: [half], room for a multiple of 16.
void Angles(float position, const float* inv_freq, int64_t half, float scaling, float* cos, float* sin) {
  const DD dd;
  const DHalf dh;
  for (int64_t i = 0; i < half; i += kDoubles) {
    HWY_ALIGN float freq[16] = {};
    for (int64_t lane = 0; lane < kDoubles && i + lane < half; ++lane) freq[lane] = inv_freq[i + lane];
    const auto angle = hn::Mul(hn::Set(dh, position), hn::Load(dh, freq));
    VD s, c;
    SinCos(hn::PromoteTo(dd, angle), &s, &c);
    const auto scale = hn::Set(dh, scaling);
    hn::Store(hn::Mul(hn::DemoteTo(dh, s), scale), dh, sin + i);
    hn::Store(hn::Mul(hn::DemoteTo(dh, c), scale), dh, cos + i);
  }
}

template <bool kBf16>
void RotateRow(float* x, int64_t heads, int64_t half, const float* cos, const float* sin) {
  const DF df;
  for (int64_t h = 0; h < heads; ++h) {
    float* first = x + 2 * h * half;
    float* second = first + half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t left = half - i;
      const bool full = left >= static_cast<int64_t>(kLanes);
      const VF a = full ? hn::LoadU(df, first + i) : LoadFirst(first + i, left);
      const VF b = full ? hn::LoadU(df, second + i) : LoadFirst(second + i, left);
      const VF c = hn::Load(df, cos + i);
      const VF s = hn::Load(df, sin + i);
      const VF y1 = RoundIf<kBf16>(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)));
      const VF y2 = RoundIf<kBf16>(hn::Add(hn::Mul(b, c), hn::Mul(a, s)));
      if (full) {
        hn::StoreU(y1, df, first + i);
        hn::StoreU(y2, df, second + i);
      } else {
        StoreFirst(y1, first + i, left);
        StoreFirst(y2, second + i, left);
      }
    }
  }
}

// table: scratch for cos and sin, 2 * (half rounded up to 16) floats.
void RopeRowsImpl(Rows x, const int64_t* positions, const float* inv_freq, float attention_scaling, int64_t half,
                  bool bf16, float* table) {
  const int64_t pitch = (half + 15) / 16 * 16;
  for (int64_t r = 0; r < x.rows; ++r) {
    Angles(static_cast<float>(positions[r]), inv_freq, half, attention_scaling, table, table + pitch);
    (bf16 ? RotateRow<true> : RotateRow<false>)(x.row(r), x.width / (2 * half), half, table, table + pitch);
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(RopeRowsImpl);

void CpuRope(const CpuContext& ctx, Rows x, std::span<const int64_t> positions, std::span<const float> inv_freq,
             float attention_scaling, int64_t head_dim) {
  LOCKSTEP_CHECK(head_dim > 0 && head_dim % 2 == 0 && x.width % head_dim == 0,
                 "width {} and head_dim {} (even) do not fit", x.width, head_dim);
  LOCKSTEP_CHECK(static_cast<int64_t>(positions.size()) == x.rows, "{} positions for {} rows", positions.size(),
                 x.rows);
  const int64_t half = head_dim / 2;
  LOCKSTEP_CHECK(static_cast<int64_t>(inv_freq.size()) == half, "{} inverse frequencies for head_dim {}",
                 inv_freq.size(), head_dim);
  const bool bf16 = ctx.profile.activations == DType::kBF16;
  ctx.threads.ParallelFor(x.rows, 4, [&](int64_t begin, int64_t end, int thread) {
    float* table = ctx.scratch.Floats(thread, 2 * (half + 16));
    HWY_DYNAMIC_DISPATCH(RopeRowsImpl)
    (x.slice(begin, end - begin), positions.data() + begin, inv_freq.data(), attention_scaling, half, bf16, table);
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

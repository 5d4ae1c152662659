// What every Highway kernel of the CPU backend shares: the 16-lane block, rounding to bf16, exp. Nothing here depends
// on the vector width, so neither do the kernels' bits. Include after hwy/foreach_target.h and hwy/highway.h; it is
// compiled once per target.
#if defined(LOCKSTEP_KERNELS_CPU_SIMD_UTIL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LOCKSTEP_KERNELS_CPU_SIMD_UTIL_INL_H_
#undef LOCKSTEP_KERNELS_CPU_SIMD_UTIL_INL_H_
#else
#define LOCKSTEP_KERNELS_CPU_SIMD_UTIL_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_NATIVE_FMA == 0 || HWY_HAVE_SCALABLE
#error "The CPU kernels need a target with fused multiply-add and a fixed vector width: see kernels/CMakeLists.txt"
#endif

// Vectors of at most 16 fp32 lanes: 16 on AVX-512, 8 on AVX2, 4 on NEON.
using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
inline constexpr size_t kLanes = HWY_MAX_BYTES / sizeof(float) < 16 ? HWY_MAX_BYTES / sizeof(float) : 16;

// Rounds every lane to the nearest bf16 value, ties to even; NaN becomes the positive quiet NaN. The same bits as
// lockstep::RoundBf16.
HWY_INLINE VF RoundBf16(VF v) {
  const DF df;
  const DU du;
  const VU bits = hn::BitCast(du, v);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::And(hn::Add(hn::Add(bits, hn::Set(du, 0x7FFFu)), odd), hn::Set(du, 0xFFFF0000u));
  return hn::IfThenElse(hn::IsNaN(v), hn::BitCast(df, hn::Set(du, 0x7FC00000u)), hn::BitCast(df, rounded));
}

// RoundBf16 where the profile rounds, nothing where it is fp32.
template <bool kBf16>
HWY_INLINE VF RoundIf(VF v) {
  if constexpr (kBf16) {
    return RoundBf16(v);
  } else {
    return v;
  }
}

// First `count` < kLanes floats, zeros behind; reads nothing past them.
HWY_INLINE VF LoadFirst(const float* from, size_t count) {
  const DF df;
  HWY_ALIGN float buffer[kLanes] = {};
  for (size_t i = 0; i < count; ++i) buffer[i] = from[i];
  return hn::Load(df, buffer);
}

// Writes the first `count` < kLanes lanes and nothing past them.
HWY_INLINE void StoreFirst(VF v, float* to, size_t count) {
  const DF df;
  HWY_ALIGN float buffer[kLanes];
  hn::Store(v, df, buffer);
  for (size_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// LoadU and StoreU that stop at the end of a row: `count` elements are left of it, any number.
HWY_INLINE VF LoadUpTo(const float* from, int64_t count) {
  if (count >= static_cast<int64_t>(kLanes)) return hn::LoadU(DF(), from);
  return count > 0 ? LoadFirst(from, static_cast<size_t>(count)) : hn::Zero(DF());
}

HWY_INLINE void StoreUpTo(VF v, float* to, int64_t count) {
  if (count >= static_cast<int64_t>(kLanes)) {
    hn::StoreU(v, DF(), to);
  } else if (count > 0) {
    StoreFirst(v, to, static_cast<size_t>(count));
  }
}

// 16 logical lanes, whatever the vector width: the unit in which sums over a row are laid out.
struct F32x16 {
  static constexpr size_t kParts = 16 / kLanes;
  VF part[kParts];
};

HWY_INLINE F32x16 Zero16() {
  F32x16 r;
  for (size_t i = 0; i < F32x16::kParts; ++i) r.part[i] = hn::Zero(DF());
  return r;
}

HWY_INLINE F32x16 Load16(const float* from) {
  F32x16 r;
  for (size_t i = 0; i < F32x16::kParts; ++i) r.part[i] = hn::LoadU(DF(), from + i * kLanes);
  return r;
}

// First `count` < 16 floats, zeros behind.
HWY_INLINE F32x16 LoadFirst16(const float* from, size_t count) {
  HWY_ALIGN float buffer[16] = {};
  for (size_t i = 0; i < count; ++i) buffer[i] = from[i];
  return Load16(buffer);
}

// a * b + c, fused.
HWY_INLINE F32x16 MulAdd16(F32x16 a, F32x16 b, F32x16 c) {
  for (size_t i = 0; i < F32x16::kParts; ++i) c.part[i] = hn::MulAdd(a.part[i], b.part[i], c.part[i]);
  return c;
}

template <class D, class V>
HWY_INLINE float TreeSum(D, V v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    v = hn::Add(v, hn::Shuffle1032(v));
    v = hn::Add(v, hn::Shuffle2301(v));
    return hn::GetLane(v);
  } else {
    const hn::Half<D> dh;
    return TreeSum(dh, hn::Add(hn::LowerHalf(dh, v), hn::UpperHalf(dh, v)));
  }
}

// Sum of the 16 lanes as a tree: lane i takes i + 8, then i + 4, i + 2, i + 1.
HWY_INLINE float Sum16(F32x16 v) {
  for (size_t half = F32x16::kParts / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) v.part[i] = hn::Add(v.part[i], v.part[i + half]);
  }
  return TreeSum(DF(), v.part[0]);
}

// Sum of x[i] * y[i]: lane i % 16 takes elements i, i + 16, ... by fused multiply-add, then Sum16.
HWY_INLINE float Dot16(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, size_t count) {
  F32x16 sum = Zero16();
  size_t i = 0;
  for (; i + 16 <= count; i += 16) sum = MulAdd16(Load16(x + i), Load16(y + i), sum);
  if (i < count) sum = MulAdd16(LoadFirst16(x + i, count - i), LoadFirst16(y + i, count - i), sum);
  return Sum16(sum);
}

// e^x, in 98 of 100 cases the nearest fp32 value and always within 0.58 ulp (0.8 where the result is subnormal;
// simd_util_test measures it); NaN gives NaN. x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 7, its
// first three terms in two words; times 2^n in two factors, each a normal number, so that subnormal results and those
// above 2^127 come out right.
HWY_INLINE VF Exp(VF x) {
  const DF df;
  const DI di;
  // Beyond these e^x is +inf or 0 in fp32 anyway.
  const VF clamped = hn::Min(hn::Max(x, hn::Set(df, -104.0f)), hn::Set(df, 89.0f));
  const VF n = hn::Round(hn::Mul(clamped, hn::Set(df, 0x1.715476p+0f)));
  // ln 2 = 0x1.62e4p-1 (short, so that n times it is exact) + 0x1.7f7d1cp-20.
  const VF rest = hn::NegMulAdd(n, hn::Set(df, 0x1.62e4p-1f), clamped);
  const VF r = hn::NegMulAdd(n, hn::Set(df, 0x1.7f7d1cp-20f), rest);
  const VF r_low = hn::NegMulAdd(n, hn::Set(df, 0x1.7f7d1cp-20f), hn::Sub(rest, r));
  // e^r = 1 + r + r^2 q(r), q minimax for the relative error over |r| <= ln 2 / 2 (Lawson's iteration): below 2^-34
  // before rounding.
  VF p = hn::Set(df, 0x1.9f085ap-13f);
  p = hn::MulAdd(p, r, hn::Set(df, 0x1.6d8d52p-10f));
  p = hn::MulAdd(p, r, hn::Set(df, 0x1.111272p-7f));
  p = hn::MulAdd(p, r, hn::Set(df, 0x1.55548ep-5f));
  p = hn::MulAdd(p, r, hn::Set(df, 0x1.555554p-3f));
  // r + r^2 / 2 as high + low, then 1 + that.
  const VF half = hn::Set(df, 0.5f);
  const VF square = hn::Mul(r, r);
  const VF half_square = hn::Mul(half, square);
  const VF high = hn::Add(r, half_square);
  VF low = hn::Sub(half_square, hn::Sub(high, r));
  low = hn::Add(low, hn::MulAdd(half, hn::MulSub(r, r, square), r_low));
  low = hn::MulAdd(hn::Mul(square, r), p, low);
  const VF one = hn::Set(df, 1.0f);
  const VF sum = hn::Add(one, high);
  p = hn::Add(sum, hn::Add(hn::Sub(high, hn::Sub(sum, one)), low));
  const auto exponent = hn::ConvertTo(di, n);
  const auto first = hn::ShiftRight<1>(exponent);
  const auto second = hn::Sub(exponent, first);
  const auto bias = hn::Set(di, 127);
  const VF scale1 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(first, bias)));
  const VF scale2 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(second, bias)));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Mul(hn::Mul(p, scale1), scale2));
}

// x / (1 + e^-x), in fp32 without an intermediate rounding to bf16. -inf gives NaN (-inf / inf), as in PyTorch.
HWY_INLINE VF Silu(VF x) {
  const VF one = hn::Set(DF(), 1.0f);
  return hn::Div(x, hn::Add(one, Exp(hn::Neg(x))));
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

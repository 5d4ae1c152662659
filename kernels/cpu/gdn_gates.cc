#include "kernels/cpu/gdn_gates.h"

#include <cstdint>

#include "rollout/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gdn_gates.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// e^x for x <= 21, within 1 ulp, in the arithmetic of PyTorch's vectors (SLEEF 3, expf_u10): degree 6, one word.
VF TorchVectorExp(VF x) {
  const DF df;
  const DI di;
  const VF clamped = hn::Max(x, hn::Set(df, -104.0f));
  const VF n = hn::Round(hn::Mul(clamped, hn::Set(df, 1.44269504088896340736f)));
  VF s = hn::NegMulAdd(n, hn::Set(df, 0.693145751953125f), clamped);
  s = hn::NegMulAdd(n, hn::Set(df, 1.428606765330187045e-06f), s);
  VF p = hn::Set(df, 0.000198527617612853646278381f);
  p = hn::MulAdd(p, s, hn::Set(df, 0.00139304355252534151077271f));
  p = hn::MulAdd(p, s, hn::Set(df, 0.00833336077630519866943359f));
  p = hn::MulAdd(p, s, hn::Set(df, 0.0416664853692054748535156f));
  p = hn::MulAdd(p, s, hn::Set(df, 0.166666671633720397949219f));
  p = hn::MulAdd(p, s, hn::Set(df, 0.5f));
  p = hn::Add(hn::Set(df, 1.0f), hn::MulAdd(hn::Mul(s, s), p, s));
  const auto exponent = hn::ConvertTo(di, n);
  const auto first = hn::ShiftRight<1>(exponent);
  const auto bias = hn::Set(di, 127);
  const VF scale1 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(first, bias)));
  const VF scale2 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(hn::Sub(exponent, first), bias)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(df, -104.0f)), hn::Mul(hn::Mul(p, scale1), scale2));
}

// ln(1 + z) for finite z >= 0, within 1 ulp, in the arithmetic of PyTorch's vectors (SLEEF 3, log1pf_u10): e ln 2 + 2
// atanh(m / (2 + m)) with 1 + z = 2^e (1 + m), the first terms of both in two words.
VF TorchVectorLog1p(VF z) {
  const DF df;
  const DI di;
  const VF one = hn::Set(df, 1.0f);
  const VF two = hn::Set(df, 2.0f);
  const VF scaled = hn::Mul(hn::Add(z, one), hn::Set(df, 1.0f / 0.75f));
  const auto exponent = hn::Sub(hn::ShiftRight<23>(hn::BitCast(di, scaled)), hn::Set(di, 127));
  const VF e = hn::ConvertTo(df, exponent);
  const VF t = hn::BitCast(df, hn::ShiftLeft<23>(hn::Sub(hn::Set(di, 127), exponent)));  // 2^-e
  const VF m = hn::MulAdd(z, t, hn::Sub(t, one));
  const VF ln2 = hn::Set(df, 0.69314718246459960938f);
  const VF e_high = hn::Mul(ln2, e);
  const VF e_low = hn::MulAdd(hn::Set(df, -1.904654323148236017e-09f), e, hn::MulSub(ln2, e, e_high));
  const VF divisor = hn::Add(two, m);
  const VF divisor_low = hn::Add(hn::Sub(two, divisor), m);
  const VF inverse = hn::Div(one, divisor);
  const VF x = hn::Mul(m, inverse);
  const VF product_low = hn::MulSub(inverse, m, x);
  const VF inverse_error = hn::NegMulAdd(divisor_low, inverse, hn::NegMulAdd(divisor, inverse, one));
  const VF x_low = hn::MulAdd(x, inverse_error, product_low);
  const VF x2 = hn::Mul(x, x);
  VF p = hn::Set(df, 0.3027294874f);
  p = hn::MulAdd(p, x2, hn::Set(df, 0.3996108174f));
  p = hn::MulAdd(p, x2, hn::Set(df, 0.6666694880f));
  const VF first = hn::Mul(two, x);
  const VF high = hn::Add(e_high, first);
  const VF low = hn::Add(hn::Add(hn::Add(hn::Sub(e_high, high), first), e_low), hn::Mul(two, x_low));
  const VF rest = hn::Mul(hn::Mul(x2, x), p);
  const VF sum = hn::Add(high, rest);
  return hn::Add(sum, hn::Add(hn::Add(hn::Sub(high, sum), rest), low));
}

// ln(1 + e^x), and x itself above 20, as PyTorch has it.
VF Softplus(VF x) {
  const DF df;
  const VF soft = TorchVectorLog1p(TorchVectorExp(hn::Min(x, hn::Set(df, 21.0f))));
  return hn::IfThenElse(hn::Or(hn::Gt(x, hn::Set(df, 20.0f)), hn::IsNaN(x)), x, soft);
}

template <bool kBf16>
VF Beta(VF b, bool neg_eigval) {
  const DF df;
  const VF one = hn::Set(df, 1.0f);
  const VF beta = RoundIf<kBf16>(hn::Div(one, hn::Add(one, Exp(hn::Neg(b)))));
  return neg_eigval ? RoundIf<kBf16>(hn::Add(beta, beta)) : beta;
}

VF Decay(VF a, VF a_log, VF dt_bias) {
  return hn::Mul(hn::Neg(Exp(a_log)), Softplus(hn::Add(a, dt_bias)));
}

template <bool kBf16>
void GatesRow(const float* a, const float* b, const float* a_log, const float* dt_bias, bool neg_eigval, int64_t heads,
              float* beta, float* g) {
  const DF df;
  int64_t h = 0;
  for (; h + static_cast<int64_t>(kLanes) <= heads; h += kLanes) {
    hn::StoreU(Beta<kBf16>(hn::LoadU(df, b + h), neg_eigval), df, beta + h);
    hn::StoreU(Decay(hn::LoadU(df, a + h), hn::LoadU(df, a_log + h), hn::LoadU(df, dt_bias + h)), df, g + h);
  }
  if (const int64_t left = heads - h; left > 0) {
    StoreFirst(Beta<kBf16>(LoadFirst(b + h, left), neg_eigval), beta + h, left);
    StoreFirst(Decay(LoadFirst(a + h, left), LoadFirst(a_log + h, left), LoadFirst(dt_bias + h, left)), g + h, left);
  }
}

void GdnGatesRowsImpl(Rows a, Rows b, const float* a_log, const float* dt_bias, bool neg_eigval, bool bf16, Rows beta,
                      Rows g) {
  for (int64_t r = 0; r < a.rows; ++r) {
    (bf16 ? GatesRow<true> : GatesRow<false>)(a.row(r), b.row(r), a_log, dt_bias, neg_eigval, a.width, beta.row(r),
                                              g.row(r));
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(GdnGatesRowsImpl);

void CpuGdnGates(const CpuContext& ctx, Rows a, Rows b, const float* a_log, const float* dt_bias, bool neg_eigval,
                 Rows beta, Rows g) {
  LOCKSTEP_CHECK(b.width == a.width && beta.width == a.width && g.width == a.width,
                 "widths of a {}, b {}, beta {}, g {} differ", a.width, b.width, beta.width, g.width);
  LOCKSTEP_CHECK(b.rows == a.rows && beta.rows == a.rows && g.rows == a.rows,
                 "rows of a {}, b {}, beta {}, g {} differ", a.rows, b.rows, beta.rows, g.rows);
  const bool bf16 = ctx.profile.activations == DType::kBF16;
  constexpr int64_t kGrain = 64;  // rows: some tens of microseconds
  ctx.threads.ParallelFor(a.rows, kGrain, [&](int64_t begin, int64_t end, int) {
    const int64_t n = end - begin;
    HWY_DYNAMIC_DISPATCH(GdnGatesRowsImpl)
    (a.slice(begin, n), b.slice(begin, n), a_log, dt_bias, neg_eigval, bf16, beta.slice(begin, n), g.slice(begin, n));
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

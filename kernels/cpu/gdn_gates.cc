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

// ln(1 + z) for 0 <= z <= 1: 2 atanh(s), s = z / (2 + z) <= 1/3. The series stops after s^15; what is left out is below
// 2^-29 of the result.
VF Log1p(VF z) {
  const DF df;
  const VF s = hn::Div(z, hn::Add(hn::Set(df, 2.0f), z));
  const VF s2 = hn::Mul(s, s);
  VF p = hn::Set(df, 2.0f / 15);
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 13));
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 11));
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 9));
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 7));
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 5));
  p = hn::MulAdd(p, s2, hn::Set(df, 2.0f / 3));
  p = hn::Mul(p, s2);
  return hn::MulAdd(p, s, hn::Add(s, s));
}

// ln(1 + e^x), and x itself above 20 as PyTorch has it. max(x, 0) + ln(1 + e^-|x|) loses nothing where e^x is large.
VF Softplus(VF x) {
  const DF df;
  const VF soft = hn::Add(hn::Max(x, hn::Zero(df)), Log1p(Exp(hn::Neg(hn::Abs(x)))));
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

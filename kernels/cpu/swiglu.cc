#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/swiglu.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include "kernels/cpu/swiglu.h"

#include "hwy/highway.h"
#include "kernels/cpu/row_grain.h"
#include "kernels/cpu/simd_util-inl.h"
#include "rollout/base/check.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

template <bool kBf16>
void SwiGluRows(const Rows& gate_up, const Rows& out) {
  for (int64_t r = 0; r < out.rows; ++r) {
    const float* gate = gate_up.row(r);
    const float* up = gate + out.width;
    for (int64_t i = 0; i < out.width; i += kLanes) {
      const int64_t left = out.width - i;
      const VF activated = RoundIf<kBf16>(Silu(LoadUpTo(gate + i, left)));
      StoreUpTo(RoundIf<kBf16>(hn::Mul(activated, LoadUpTo(up + i, left))), out.row(r) + i, left);
    }
  }
}

void SwiGlu(bool bf16, const Rows& gate_up, const Rows& out) {
  bf16 ? SwiGluRows<true>(gate_up, out) : SwiGluRows<false>(gate_up, out);
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
namespace {

HWY_EXPORT(SwiGlu);

}  // namespace

void CpuSwiGlu(const CpuContext& ctx, Rows gate_up, Rows out) {
  LOCKSTEP_CHECK(gate_up.rows == out.rows && gate_up.width == 2 * out.width, "SwiGlu: gate_up [{}, {}], out [{}, {}]",
                 gate_up.rows, gate_up.width, out.rows, out.width);
  const auto run = HWY_DYNAMIC_DISPATCH(SwiGlu);
  const bool bf16 = ctx.profile.activations == DType::kBF16;
  ctx.threads.ParallelFor(out.rows, RowGrain(gate_up.width), [&](int64_t begin, int64_t end, int) {
    run(bf16, gate_up.slice(begin, end - begin), out.slice(begin, end - begin));
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

// What both chunk programs share: normalised q and k of a block, decay factors, and products against a lower triangle.
// Compiled once per target.
#if defined(LOCKSTEP_KERNELS_CPU_GDN_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LOCKSTEP_KERNELS_CPU_GDN_ROWS_INL_H_
#undef LOCKSTEP_KERNELS_CPU_GDN_ROWS_INL_H_
#else
#define LOCKSTEP_KERNELS_CPU_GDN_ROWS_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/gdn_chunk.h"
#include "kernels/cpu/row_matrix-inl.h"
#include "kernels/cpu/simd_util-inl.h"
#include "kernels/cpu/square_sum-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr float kL2NormEps = 1e-6f;

// x / sqrt(sum x^2 + eps), as one factor times x.
HWY_INLINE float InverseNorm(SquareSum order, const float* x, int64_t count) {
  return 1.0f / std::sqrt(SumOfSquares(order, x, count) + kL2NormEps);
}

// to[i] = fn(from[i]) by vectors, with nothing read or written past `count`.
template <class Fn>
HWY_INLINE void MapRow(const float* from, float* to, int64_t count, Fn fn) {
  const DF df;
  int64_t i = 0;
  for (; i + static_cast<int64_t>(kLanes) <= count; i += kLanes) hn::StoreU(fn(hn::LoadU(df, from + i)), df, to + i);
  if (i < count) StoreFirst(fn(LoadFirst(from + i, count - i)), to + i, count - i);
}

HWY_INLINE float FirstLane(VF v) {
  return hn::GetLane(v);
}

// c[i] += the chain over rows j in [0, prefix + i + diagonal) of a[i][j] * b[j], for a block's rows i. Rows of
// b below `prefix` are finished before the block; the block's own come one by one, so that no row is multiplied that
// the output row may not see.
template <class B>
HWY_INLINE void LowerTriangle(int64_t rows, int64_t prefix, bool diagonal, int64_t columns, const float* a, const B* b,
                              int64_t ldb, float* c, int64_t ldc) {
  if (prefix > 0) MatMul<Start::kOutput>(rows, columns, prefix, a, kGdnChunk, b, ldb, c, ldc);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t depth = i + (diagonal ? 1 : 0);
    if (depth > 0)
      MatMul<Start::kOutput>(1, columns, depth, a + i * kGdnChunk + prefix, kGdnChunk, b + prefix * ldb, ldb,
                             c + i * ldc, ldc);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

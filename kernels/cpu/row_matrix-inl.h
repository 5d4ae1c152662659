// Small matrix products whose every output is one chain of fused multiply-adds over ascending k, started from zero or
// from what the output holds. Lanes run over outputs, so neither the vector width nor the register tile nor a chain cut
// in two calls shows in the bits. Operands are fp32 words or bf16 bits (uint16_t). Compiled once
// per target.
#if defined(LOCKSTEP_KERNELS_CPU_ROW_MATRIX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LOCKSTEP_KERNELS_CPU_ROW_MATRIX_INL_H_
#undef LOCKSTEP_KERNELS_CPU_ROW_MATRIX_INL_H_
#else
#define LOCKSTEP_KERNELS_CPU_ROW_MATRIX_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Accumulators a register tile may hold: AVX2 has 16 vector registers, AVX-512 and NEON 32.
inline constexpr int kAccumulators = HWY_TARGET == HWY_AVX2 ? 12 : 24;

HWY_INLINE VF LoadWide(const float* from) {
  return hn::LoadU(DF(), from);
}
HWY_INLINE VF LoadWide(const uint16_t* from) {
  const DU du;
  const hn::Rebind<uint16_t, DF> d16;
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, from))));
}

// Stores lanes that already hold bf16 values as bf16 bits.
HWY_INLINE void StoreBf16(VF v, uint16_t* to) {
  const DU du;
  const hn::Rebind<uint16_t, DF> d16;
  hn::StoreU(hn::TruncateTo(d16, hn::ShiftRight<16>(hn::BitCast(du, v))), d16, to);
}

enum class Start { kZero, kOutput };

template <int kRows, int kVectors, Start kStart, class B>
HWY_INLINE void MatMulTile(int64_t depth, const float* HWY_RESTRICT a, int64_t lda, const B* HWY_RESTRICT b,
                           int64_t ldb, float* HWY_RESTRICT c, int64_t ldc) {
  const DF df;
  VF sum[kRows][kVectors];
  HWY_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kStart == Start::kZero ? hn::Zero(df) : hn::LoadU(df, c + r * ldc + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    // One or two rows against a matrix wait for memory (a decode row and its state), and run better 8 rows of it ahead.
    if constexpr (kRows <= 2 && kVectors > 4) {
      const B* ahead = b + 8 * ldb;
      HWY_UNROLL(16)
      for (size_t i = 0; i < kVectors * kLanes; i += 64 / sizeof(B)) hwy::Prefetch(ahead + i);
    }
    VF row[kVectors];
    HWY_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) row[v] = LoadWide(b + v * kLanes);
    HWY_UNROLL(16)
    for (int r = 0; r < kRows; ++r) {
      const VF factor = hn::Set(df, a[r * lda + k]);
      HWY_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(factor, row[v], sum[r][v]);
    }
    b += ldb;
  }
  HWY_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], df, c + r * ldc + v * kLanes);
  }
}

// Column panels outside, groups of kRows inside: a panel of b stays in the first-level cache while the rows pass over
// it.
template <int kRows, int kVectors, Start kStart, class B>
HWY_INLINE void MatMulPanels(int64_t groups, int64_t columns, int64_t depth, const float* a, int64_t lda, const B* b,
                             int64_t ldb, float* c, int64_t ldc) {
  constexpr int64_t kWidth = kVectors * static_cast<int64_t>(kLanes);
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) {
    for (int64_t g = 0; g < groups; ++g) {
      MatMulTile<kRows, kVectors, kStart>(depth, a + g * kRows * lda, lda, b + column, ldb,
                                          c + g * kRows * ldc + column, ldc);
    }
  }
  if constexpr (kVectors > 1) {
    if (column < columns) {
      MatMulPanels<kRows, (kVectors > 4 ? 4 : kVectors / 2), kStart>(groups, columns - column, depth, a, lda,
                                                                     b + column, ldb, c + column, ldc);
    }
  }
}

// c[r][n] = (or +=) the chain over k < depth of a[r][k] * b[k][n]. c: [rows, columns], columns a multiple of 16.
template <Start kStart, class B>
HWY_INLINE void MatMul(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const B* b,
                       int64_t ldb, float* c, int64_t ldc) {
  if constexpr (kAccumulators == 24) {
    if (const int64_t groups = rows / 8; groups > 0) {
      MatMulPanels<8, 3, kStart>(groups, columns, depth, a, lda, b, ldb, c, ldc);
      a += groups * 8 * lda;
      c += groups * 8 * ldc;
      rows -= groups * 8;
    }
  }
  if (const int64_t groups = rows / 4; groups > 0) {
    MatMulPanels<4, kAccumulators / 4, kStart>(groups, columns, depth, a, lda, b, ldb, c, ldc);
    a += groups * 4 * lda;
    c += groups * 4 * ldc;
    rows -= groups * 4;
  }
  if (rows >= 2) {
    MatMulPanels<2, kAccumulators / 2, kStart>(1, columns, depth, a, lda, b, ldb, c, ldc);
    a += 2 * lda;
    c += 2 * ldc;
    rows -= 2;
  }
  if (rows > 0) MatMulPanels<1, 12, kStart>(1, columns, depth, a, lda, b, ldb, c, ldc);
}

template <int kRows, int kPanels, class B>
HWY_INLINE void DotPanelsTile(int64_t depth, const float* HWY_RESTRICT a, int64_t lda, const B* const* panels,
                              float* HWY_RESTRICT c, int64_t ldc) {
  const DF df;
  constexpr int kParts = static_cast<int>(F32x16::kParts);
  const B* panel[kPanels];
  VF sum[kRows][kPanels * kParts];
  HWY_UNROLL(16)
  for (int p = 0; p < kPanels; ++p) panel[p] = panels[p];
  HWY_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(32)
    for (int v = 0; v < kPanels * kParts; ++v) sum[r][v] = hn::Zero(df);
  }
  for (int64_t k = 0; k < depth; ++k) {
    VF factor[kRows];
    HWY_UNROLL(16)
    for (int r = 0; r < kRows; ++r) factor[r] = hn::Set(df, a[r * lda + k]);
    HWY_UNROLL(32)
    for (int v = 0; v < kPanels * kParts; ++v) {
      const VF keys = LoadWide(panel[v / kParts] + k * 16 + v % kParts * kLanes);
      HWY_UNROLL(16)
      for (int r = 0; r < kRows; ++r) sum[r][v] = hn::MulAdd(factor[r], keys, sum[r][v]);
    }
  }
  HWY_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(32)
    for (int v = 0; v < kPanels * kParts; ++v) hn::StoreU(sum[r][v], df, c + r * ldc + v * kLanes);
  }
}

template <int kRows, int kPanels, class B>
HWY_INLINE void DotPanelsRows(int64_t count, int64_t depth, const float* a, int64_t lda, const B* const* panels,
                              float* c, int64_t ldc) {
  int64_t p = 0;
  for (; p + kPanels <= count; p += kPanels) DotPanelsTile<kRows, kPanels>(depth, a, lda, panels + p, c + p * 16, ldc);
  if constexpr (kPanels > 1) {
    if (p < count) DotPanelsRows<kRows, kPanels / 2>(count - p, depth, a, lda, panels + p, c + p * 16, ldc);
  }
}

// Dot products with 16 keys at a time: panel p holds keys 16p..16p+15 as [depth][16], and c[r][16p + lane] = the chain
// over k of a[r][k] * panels[p][k][lane]. Lanes of keys that do not exist hold whatever the panel held; they touch no
// other lane. Only the first `count` panels are looked at.
template <class B, size_t kMaxPanels>
HWY_INLINE void DotPanels(int64_t rows, int64_t count, int64_t depth, const float* a, int64_t lda,
                          const B* const (&panels)[kMaxPanels], float* c, int64_t ldc) {
  // Panels beside each other: enough chains to hide the multiply-add's latency, as many as the registers hold, a power
  // of two.
  constexpr int kParts = static_cast<int>(F32x16::kParts);
  constexpr int kMax = static_cast<int>(kMaxPanels);
  constexpr int kOne = std::min(kMax, 8 / kParts);
  constexpr int kTwo = std::min(kMax, kAccumulators == 24 ? 8 / kParts : 2);
  constexpr int kFour = std::min(kMax, kAccumulators == 24 ? 4 / kParts : 1);
  while (rows >= 4) {
    DotPanelsRows<4, kFour>(count, depth, a, lda, panels, c, ldc);
    a += 4 * lda;
    c += 4 * ldc;
    rows -= 4;
  }
  while (rows >= 2) {
    DotPanelsRows<2, kTwo>(count, depth, a, lda, panels, c, ldc);
    a += 2 * lda;
    c += 2 * ldc;
    rows -= 2;
  }
  if (rows > 0) DotPanelsRows<1, kOne>(count, depth, a, lda, panels, c, ldc);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

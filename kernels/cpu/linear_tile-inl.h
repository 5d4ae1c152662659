// The register tiles of the linear layer: R rows of x by V vectors of output features, over one block of k. Every
// output is one accumulator; lanes run over features, so no vector width shows in the bits. Compiled once per target.
#if defined(LOCKSTEP_KERNELS_CPU_LINEAR_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LOCKSTEP_KERNELS_CPU_LINEAR_TILE_INL_H_
#undef LOCKSTEP_KERNELS_CPU_LINEAR_TILE_INL_H_
#else
#define LOCKSTEP_KERNELS_CPU_LINEAR_TILE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/linear_weight.h"
#include "kernels/cpu/simd_util-inl.h"

#ifndef LOCKSTEP_KERNELS_CPU_LINEAR_TILE_ONCE_
#define LOCKSTEP_KERNELS_CPU_LINEAR_TILE_ONCE_
namespace lockstep {

// What a tile multiplies, and how. x is packed as [steps][R] words; see linear_weight.h for the panels.
enum class TileKind : uint8_t {
  kF32,         // a word of x is a float
  kBf16Halves,  // the same
  kPairsFma,    // two floats a step, [2][R]: the odd k, then the even one
  kPairsDot,    // a word is the pair, as the weight's; vdpbf16ps gives the bits of kPairsFma with subnormals flushed
};

// Words of x, per row and step.
constexpr int64_t TileStepWords(TileKind kind) {
  return kind == TileKind::kPairsFma ? 2 : 1;
}

// One tile over one block of k.
struct LinearTile {
  const float* x;
  const std::byte* panel;  // the first word vector's panel, at the block's first step
  int64_t panel_bytes;
  int64_t steps;
  int word_vector;   // index of the first one inside its panel
  float* out;        // row 0, at the first feature of the first word vector's panel
  int64_t stride;    // of out
  int64_t features;  // valid ones from `out` on
  bool resume;       // `out` holds what earlier blocks left: the accumulators, or for pairs the blocks' sum
  bool round;        // round to bf16 on the way out
};

}  // namespace lockstep
#endif

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A "word vector" is kLanes words of a panel and gives 2 * kLanes output features: f .. f + kLanes - 1 and the same +
// 16.
inline constexpr int kWordVectors = static_cast<int>(F32x16::kParts);  // per panel

// Accumulators that fit beside the operands: 32 vector registers on AVX-512 and NEON, 16 on AVX2.
inline constexpr int kTileAccumulators = HWY_TARGET == HWY_AVX2 ? 12 : 24;
inline constexpr int kMaxTileRows = kTileAccumulators / 2;

// Word vectors side by side in a tile of R rows: few rows need more of them, or the latency of the multiply-add shows
// (4 cycles, 2 a cycle: at least 8 accumulators in flight).
constexpr int TileWordVectors(int rows) {
  return rows * 8 <= kTileAccumulators ? 4 : rows * 4 <= kTileAccumulators ? 2 : 1;
}

// The high or low half of every word, as fp32.
HWY_INLINE VF Bf16Half(VU words, bool high) {
  return hn::BitCast(DF(), high ? hn::And(words, hn::Set(DU(), 0xFFFF0000u)) : hn::ShiftLeft<16>(words));
}

// sum + x1 w1, then + x0 w0, each a fused multiply-add; x0, w0 are the low halves. Inline assembly, because no target
// of Highway 1.0 has it and a function compiled for it could not be inlined here.
HWY_INLINE VF PairDot(VF sum, VU x, VU w) {
#if HWY_TARGET == HWY_AVX3
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(w.raw));
#else
  static_cast<void>(x);
  static_cast<void>(w);
#endif
  return sum;
}

// Every loop over r and v is unrolled whole: the accumulators have to live in registers.
template <TileKind kKind, int R, int V>
void RunTile(const LinearTile& t) {
  const DF df;
  const DU du;
  constexpr bool kPairs = kKind == TileKind::kPairsFma || kKind == TileKind::kPairsDot;
  constexpr int64_t kStepBytes = kPanelFeatures * (kKind == TileKind::kBf16Halves ? 2 : 4);
  VF high[R][V];
  VF low[R][V];
  const std::byte* stream[V];
  float* out[V];
  int64_t valid[V];
  for (int v = 0; v < V; ++v) {
    const int64_t index = t.word_vector + v;
    const int64_t lane = index % kWordVectors * static_cast<int64_t>(kLanes);
    stream[v] = t.panel + index / kWordVectors * t.panel_bytes + lane * 4;
    const int64_t feature = index / kWordVectors * kPanelFeatures + lane;
    out[v] = t.out + feature;
    valid[v] = t.features - feature;
  }
  HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
    HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
      high[r][v] = !kPairs && t.resume ? LoadUpTo(out[v] + r * t.stride, valid[v]) : hn::Zero(df);
      low[r][v] = !kPairs && t.resume ? LoadUpTo(out[v] + r * t.stride + 16, valid[v] - 16) : hn::Zero(df);
    }
  }
  const float* HWY_RESTRICT x = t.x;
  int64_t offset = 0;
  for (int64_t step = 0; step < t.steps; ++step) {
    VU first[V];
    VU second[V];
    HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(stream[v] + offset);
      first[v] = hn::LoadU(du, words);
      if constexpr (kKind != TileKind::kBf16Halves) second[v] = hn::LoadU(du, words + 16);
    }
    if constexpr (kKind == TileKind::kPairsDot) {
      HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
        const VU xr = hn::BitCast(du, hn::Set(df, x[r]));
        HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
          high[r][v] = PairDot(high[r][v], xr, first[v]);
          low[r][v] = PairDot(low[r][v], xr, second[v]);
        }
      }
      x += R;
    } else if constexpr (kKind == TileKind::kPairsFma) {
      HWY_UNROLL(2) for (int half = 0; half < 2; ++half) {
        HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
          const VF w_high = Bf16Half(first[v], half == 0);
          const VF w_low = Bf16Half(second[v], half == 0);
          HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
            const VF xr = hn::Set(df, x[r]);
            high[r][v] = hn::MulAdd(xr, w_high, high[r][v]);
            low[r][v] = hn::MulAdd(xr, w_low, low[r][v]);
          }
        }
        x += R;
      }
    } else {
      VF w_high[V];
      VF w_low[V];
      HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
        constexpr bool kHalves = kKind == TileKind::kBf16Halves;
        w_high[v] = kHalves ? Bf16Half(first[v], true) : hn::BitCast(df, first[v]);
        w_low[v] = kHalves ? Bf16Half(first[v], false) : hn::BitCast(df, second[v]);
      }
      HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
        const VF xr = hn::Set(df, x[r]);
        HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
          high[r][v] = hn::MulAdd(xr, w_high[v], high[r][v]);
          low[r][v] = hn::MulAdd(xr, w_low[v], low[r][v]);
        }
      }
      x += R;
    }
    offset += kStepBytes;
  }
  HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
    HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
      VF h = high[r][v];
      VF l = low[r][v];
      if (kPairs && t.resume) {
        h = hn::Add(LoadUpTo(out[v] + r * t.stride, valid[v]), h);
        l = hn::Add(LoadUpTo(out[v] + r * t.stride + 16, valid[v] - 16), l);
      }
      StoreUpTo(t.round ? RoundBf16(h) : h, out[v] + r * t.stride, valid[v]);
      StoreUpTo(t.round ? RoundBf16(l) : l, out[v] + r * t.stride + 16, valid[v] - 16);
    }
  }
}

using TileFn = void (*)(const LinearTile&);

// Per row count: the full-width tile and, for what is left at the end of a range, a tile of one word vector.
struct TileFns {
  TileFn wide;
  TileFn single;
  int word_vectors;  // of `wide`
};

template <TileKind kKind, size_t... kIndex>
constexpr std::array<TileFns, kMaxTileRows> MakeTileFns(std::index_sequence<kIndex...>) {
  return {{{&RunTile<kKind, kIndex + 1, TileWordVectors(kIndex + 1)>, &RunTile<kKind, kIndex + 1, 1>,
            TileWordVectors(kIndex + 1)}...}};
}

template <TileKind kKind>
inline constexpr std::array<TileFns, kMaxTileRows> kTileFns =
    MakeTileFns<kKind>(std::make_index_sequence<kMaxTileRows>());

using D4 = hn::FixedTag<float, 4>;

// Four vectors of four words, transposed: word i of `rows[r]` goes to to[i * stride + r].
HWY_INLINE void StoreTransposed(const hn::Vec<D4> (&rows)[4], int64_t stride, float* HWY_RESTRICT to) {
  const D4 d;
  const auto low01 = hn::InterleaveLower(d, rows[0], rows[1]);
  const auto low23 = hn::InterleaveLower(d, rows[2], rows[3]);
  const auto high01 = hn::InterleaveUpper(d, rows[0], rows[1]);
  const auto high23 = hn::InterleaveUpper(d, rows[2], rows[3]);
  hn::StoreU(hn::ConcatLowerLower(d, low23, low01), d, to);
  hn::StoreU(hn::ConcatUpperUpper(d, low23, low01), d, to + stride);
  hn::StoreU(hn::ConcatLowerLower(d, high23, high01), d, to + 2 * stride);
  hn::StoreU(hn::ConcatUpperUpper(d, high23, high01), d, to + 3 * stride);
}

// The pair that begins at an even k as a word, its odd half zero where the row ends.
HWY_INLINE float PairWord(const float* x, bool whole) {
  const uint32_t even = std::bit_cast<uint32_t>(x[0]) >> 16;
  const uint32_t odd = whole ? std::bit_cast<uint32_t>(x[1]) & 0xFFFF0000u : 0;
  return std::bit_cast<float>(odd | even);
}

// Eight values as four such words.
HWY_INLINE hn::Vec<D4> PairWords(const float* x) {
  const D4 d;
  const hn::RebindToUnsigned<D4> du;
  const auto first = hn::LoadU(d, x);
  const auto second = hn::LoadU(d, x + 4);
  const auto even = hn::BitCast(du, hn::ConcatEven(d, second, first));
  const auto odd = hn::BitCast(du, hn::ConcatOdd(d, second, first));
  return hn::BitCast(d, hn::Or(hn::And(odd, hn::Set(du, 0xFFFF0000u)), hn::ShiftRight<16>(even)));
}

HWY_INLINE void PackPairRow(const float* HWY_RESTRICT x, int64_t k_count, float* HWY_RESTRICT to) {
  int64_t k = 0;
  for (; k + 8 <= k_count; k += 8) hn::StoreU(PairWords(x + k), D4(), to + k / 2);
  for (; k < k_count; k += 2) to[k / 2] = PairWord(x + k, k + 1 < k_count);
}

// k_count values of `rows` rows of x to the tile's form: 4 rows and 4 (for words of pairs 8) values of k by vectors,
// what is left one by one.
template <TileKind kKind>
void PackTile(const float* HWY_RESTRICT x, int64_t stride, int64_t rows, int64_t k_count, float* HWY_RESTRICT to) {
  const D4 d;
  constexpr int64_t kUnit = kKind == TileKind::kPairsDot ? 8 : 4;
  const int64_t k_whole = k_count / kUnit * kUnit;
  if (kKind == TileKind::kPairsDot && rows == 1) return PackPairRow(x, k_count, to);
  int64_t r = 0;
  for (; r < rows; r += 4) {
    const bool four = r + 4 <= rows;
    const float* HWY_RESTRICT from = x + r * stride;
    float* HWY_RESTRICT out = to + r;
    for (int64_t k = 0; four && k < k_whole; k += kUnit) {
      hn::Vec<D4> words[4];
      HWY_UNROLL(4) for (int i = 0; i < 4; ++i) {
        const float* values = from + i * stride + k;
        if constexpr (kKind == TileKind::kPairsDot) {
          words[i] = PairWords(values);
        } else if constexpr (kKind == TileKind::kPairsFma) {
          words[i] = hn::Shuffle2301(hn::LoadU(d, values));
        } else {
          words[i] = hn::LoadU(d, values);
        }
      }
      StoreTransposed(words, rows, out + (kKind == TileKind::kPairsDot ? k / 2 : k) * rows);
    }
    for (int64_t i = 0; i < std::min<int64_t>(4, rows - r); ++i) {
      const float* row = from + i * stride;
      for (int64_t k = four ? k_whole : 0; k < k_count; k += kKind == TileKind::kPairsDot ? 2 : 1) {
        const bool whole = k + 1 < k_count;
        if constexpr (kKind == TileKind::kPairsDot) {
          out[k / 2 * rows + i] = PairWord(row + k, whole);
        } else if constexpr (kKind == TileKind::kPairsFma) {
          if (k % 2 == 0 && !whole) out[k * rows + i] = 0.0f;
          out[(k % 2 == 0 ? k + 1 : k - 1) * rows + i] = row[k];
        } else {
          out[k * rows + i] = row[k];
        }
      }
    }
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

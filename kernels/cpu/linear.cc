#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include "kernels/cpu/linear.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/linear_plan.h"
#include "kernels/cpu/linear_weight.h"
#include "kernels/cpu/simd_util-inl.h"
#include "rollout/base/check.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// A "word vector" is kLanes words of a panel, hence 2 * kLanes output features: f .. f + kLanes - 1 and the same + 16.
constexpr int kWordVectors = static_cast<int>(F32x16::kParts);  // per panel

// Accumulators that fit beside the operands: 32 vector registers on AVX-512 and NEON, 16 on AVX2.
constexpr int kAccumulators = HWY_TARGET == HWY_AVX2 ? 12 : 24;
constexpr int kMaxTileRows = kAccumulators / 2;

// Word vectors side by side in a tile of R rows: few rows need more of them, or the latency of the fused multiply-add
// shows (4 cycles, 2 a cycle: at least 8 accumulators in flight).
constexpr int TileWordVectors(int rows) {
  return rows * 8 <= kAccumulators ? 4 : rows * 4 <= kAccumulators ? 2 : 1;
}

// One register tile: R rows by V word vectors over `k_count` steps of k.
struct Tile {
  const float* x;          // [k_count][R]
  const std::byte* panel;  // the first word vector's panel, at the block's first k
  int64_t panel_bytes;
  int64_t k_count;
  int word_vector;   // index of the first one inside its panel
  float* out;        // row 0, at the first feature of the first word vector's panel
  int64_t stride;    // of out
  int64_t features;  // valid ones from `out` on
  bool resume;       // start from the accumulators that an earlier block of k left in `out`
  bool round;        // round to bf16 on the way out
};

// Every loop over r and v is unrolled whole: the accumulators have to live in registers.
template <bool kBf16Weights, int R, int V>
void RunTile(const Tile& t) {
  const DF df;
  const DU du;
  constexpr int64_t kStepBytes = kPanelFeatures * (kBf16Weights ? 2 : 4);
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
      high[r][v] = t.resume ? LoadUpTo(out[v] + r * t.stride, valid[v]) : hn::Zero(df);
      low[r][v] = t.resume ? LoadUpTo(out[v] + r * t.stride + 16, valid[v] - 16) : hn::Zero(df);
    }
  }
  const float* HWY_RESTRICT x = t.x;
  int64_t offset = 0;
  for (int64_t k = 0; k < t.k_count; ++k) {
    VF w_high[V];
    VF w_low[V];
    HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
      if constexpr (kBf16Weights) {
        const VU words = hn::LoadU(du, reinterpret_cast<const uint32_t*>(stream[v] + offset));
        w_high[v] = hn::BitCast(df, hn::And(words, hn::Set(du, 0xFFFF0000u)));
        w_low[v] = hn::BitCast(df, hn::ShiftLeft<16>(words));
      } else {
        const float* floats = reinterpret_cast<const float*>(stream[v] + offset);
        w_high[v] = hn::LoadU(df, floats);
        w_low[v] = hn::LoadU(df, floats + 16);
      }
    }
    HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
      const VF xr = hn::Set(df, x[r]);
      HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
        high[r][v] = hn::MulAdd(xr, w_high[v], high[r][v]);
        low[r][v] = hn::MulAdd(xr, w_low[v], low[r][v]);
      }
    }
    x += R;
    offset += kStepBytes;
  }
  HWY_UNROLL(16) for (int r = 0; r < R; ++r) {
    HWY_UNROLL(16) for (int v = 0; v < V; ++v) {
      const VF h = t.round ? RoundBf16(high[r][v]) : high[r][v];
      const VF l = t.round ? RoundBf16(low[r][v]) : low[r][v];
      StoreUpTo(h, out[v] + r * t.stride, valid[v]);
      StoreUpTo(l, out[v] + r * t.stride + 16, valid[v] - 16);
    }
  }
}

using TileFn = void (*)(const Tile&);

// Per row count: the full-width tile and, for what is left at the end of a range, a tile of one word vector.
struct TileFns {
  TileFn wide;
  TileFn single;
  int word_vectors;  // of `wide`
};

template <bool kBf16Weights, size_t... kIndex>
constexpr std::array<TileFns, kMaxTileRows> MakeTileFns(std::index_sequence<kIndex...>) {
  return {{{&RunTile<kBf16Weights, kIndex + 1, TileWordVectors(kIndex + 1)>, &RunTile<kBf16Weights, kIndex + 1, 1>,
            TileWordVectors(kIndex + 1)}...}};
}

constexpr std::array<TileFns, kMaxTileRows> kBf16Tiles = MakeTileFns<true>(std::make_index_sequence<kMaxTileRows>());
constexpr std::array<TileFns, kMaxTileRows> kF32Tiles = MakeTileFns<false>(std::make_index_sequence<kMaxTileRows>());

int TileRowsOfTarget() {
  return kMaxTileRows;
}

// [rows][k_count] at `x` to [k_count][rows] at `to`: 4 x 4 transposes, then what is left one by one.
void PackTile(const float* HWY_RESTRICT x, int64_t stride, int64_t rows, int64_t k_count, float* HWY_RESTRICT to) {
  const hn::FixedTag<float, 4> d;
  const int64_t k_whole = k_count / 4 * 4;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* HWY_RESTRICT from = x + r * stride;
    float* HWY_RESTRICT out = to + r;
    for (int64_t k = 0; k < k_whole; k += 4) {
      const auto row0 = hn::LoadU(d, from + k);
      const auto row1 = hn::LoadU(d, from + stride + k);
      const auto row2 = hn::LoadU(d, from + 2 * stride + k);
      const auto row3 = hn::LoadU(d, from + 3 * stride + k);
      const auto low01 = hn::InterleaveLower(d, row0, row1);
      const auto low23 = hn::InterleaveLower(d, row2, row3);
      const auto high01 = hn::InterleaveUpper(d, row0, row1);
      const auto high23 = hn::InterleaveUpper(d, row2, row3);
      hn::StoreU(hn::ConcatLowerLower(d, low23, low01), d, out + k * rows);
      hn::StoreU(hn::ConcatUpperUpper(d, low23, low01), d, out + (k + 1) * rows);
      hn::StoreU(hn::ConcatLowerLower(d, high23, high01), d, out + (k + 2) * rows);
      hn::StoreU(hn::ConcatUpperUpper(d, high23, high01), d, out + (k + 3) * rows);
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = k_whole; k < k_count; ++k) out[k * rows + i] = from[i * stride + k];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t k = 0; k < k_count; ++k) to[k * rows + r] = x[r * stride + k];
  }
}

// One task: rows [row_begin, row_end) by panels [panel_begin, panel_end), all of k.
void RunTask(const Rows& x, const CpuLinearWeight& weight, const Rows& out, bool round, const LinearPlan::Task& task,
             int64_t k_block, float* scratch) {
  const auto& fns = weight.dtype() == DType::kBF16 ? kBf16Tiles : kF32Tiles;
  const int64_t k_total = weight.in_features();
  const int64_t step_bytes = kPanelFeatures * DTypeBytes(weight.dtype());
  const int64_t rows = task.row_end - task.row_begin;
  const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t words = (task.panel_end - task.panel_begin) * kWordVectors;
  // Tiles of two heights, one apart; `first_row(i)` begins tile i.
  const auto first_row = [&](int64_t tile) { return tile * (rows / tiles) + std::min(tile, rows % tiles); };
  const int64_t step = std::max(fns[rows / tiles - 1].word_vectors, fns[first_row(1) - 1].word_vectors);
  for (int64_t k = 0; k < k_total; k += k_block) {
    const int64_t k_count = std::min(k_block, k_total - k);
    // A single row is its own packed form.
    if (rows > 1) {
      for (int64_t i = 0; i < tiles; ++i) {
        PackTile(x.row(task.row_begin + first_row(i)) + k, x.stride, first_row(i + 1) - first_row(i), k_count,
                 scratch + first_row(i) * k_count);
      }
    }
    for (int64_t word = 0; word < words; word += step) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t height = first_row(i + 1) - first_row(i);
        const TileFns& fn = fns[height - 1];
        const int64_t word_end = std::min(word + step, words);
        for (int64_t w = word; w < word_end;) {
          const bool wide = w + fn.word_vectors <= word_end;
          const int64_t panel = task.panel_begin + w / kWordVectors;
          const int64_t row = task.row_begin + first_row(i);
          (wide ? fn.wide : fn.single)({
              .x = rows > 1 ? scratch + first_row(i) * k_count : x.row(row) + k,
              .panel = weight.panel(panel) + k * step_bytes,
              .panel_bytes = k_total * step_bytes,
              .k_count = k_count,
              .word_vector = static_cast<int>(w % kWordVectors),
              .out = out.row(row) + panel * kPanelFeatures,
              .stride = out.stride,
              .features = out.width - panel * kPanelFeatures,
              .resume = k > 0,
              .round = round && k + k_count == k_total,
          });
          w += wide ? fn.word_vectors : 1;
        }
      }
    }
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
namespace {

HWY_EXPORT(RunTask);
HWY_EXPORT(TileRowsOfTarget);

void RunLinear(const CpuContext& ctx, Rows x, const LinearWeight& packed, Rows out, DType rounding) {
  const auto& weight = static_cast<const CpuLinearWeight&>(packed);
  LOCKSTEP_CHECK(x.width == weight.in_features() && out.width == weight.out_features() && x.rows == out.rows,
                 "Linear: x [{}, {}], weight [{}, {}], out [{}, {}]", x.rows, x.width, weight.out_features(),
                 weight.in_features(), out.rows, out.width);
  LOCKSTEP_CHECK(weight.dtype() == ctx.profile.weights, "Linear: weight packed as {}, profile {} wants {}",
                 DTypeName(weight.dtype()), ctx.profile.name, DTypeName(ctx.profile.weights));
  if (x.rows == 0) return;
  const LinearPlan plan({.rows = x.rows,
                         .in_features = weight.in_features(),
                         .panels = weight.panels(),
                         .tile_rows = HWY_DYNAMIC_DISPATCH(TileRowsOfTarget)(),
                         .threads = ctx.threads.threads()});
  const auto run_task = HWY_DYNAMIC_DISPATCH(RunTask);
  const int64_t grain = plan.parallel() ? 1 : plan.tasks();
  ctx.threads.ParallelFor(plan.tasks(), grain, [&](int64_t begin, int64_t end, int thread) {
    float* scratch = ctx.scratch.Floats(thread, plan.scratch_floats());
    for (int64_t i = begin; i < end; ++i) {
      run_task(x, weight, out, rounding == DType::kBF16, plan.task(i), plan.k_block(), scratch);
    }
  });
}

}  // namespace

void CpuLinear(const CpuContext& ctx, Rows x, const LinearWeight& weight, Rows out) {
  RunLinear(ctx, x, weight, out, ctx.profile.activations);
}

void CpuLogits(const CpuContext& ctx, Rows x, const LinearWeight& weight, Rows out) {
  RunLinear(ctx, x, weight, out, ctx.profile.logits);
}

}  // namespace lockstep
#endif  // HWY_ONCE

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include "kernels/cpu/linear.h"

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/flush_subnormals.h"
#include "kernels/cpu/linear_plan.h"
#include "kernels/cpu/linear_tile-inl.h"
#include "kernels/cpu/linear_weight.h"
#include "rollout/base/check.h"

#ifndef LOCKSTEP_KERNELS_CPU_LINEAR_ONCE_
#define LOCKSTEP_KERNELS_CPU_LINEAR_ONCE_
namespace lockstep {

// What the tasks of one call share.
struct LinearTask {
  const Rows& x;
  const CpuLinearWeight& weight;
  const Rows& out;
  bool round;       // to bf16
  int64_t k_block;  // in steps of the weight's panels
};

}  // namespace lockstep
#endif

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

int TileRowsOfTarget() {
  return kMaxTileRows;
}

// One task: rows [row_begin, row_end) by panels [panel_begin, panel_end), all of k.
template <TileKind kKind>
void RunTask(const LinearTask& l, const LinearPlan::Task& task, float* scratch) {
  constexpr auto& fns = kTileFns<kKind>;  // NOLINT(readability-identifier-naming)
  constexpr bool kPairs = kKind == TileKind::kPairsFma || kKind == TileKind::kPairsDot;
  // A single row of floats in order is its own packed form.
  const bool packs = kPairs || task.row_end - task.row_begin > 1;
  const int64_t step_bytes = l.weight.step_bytes();
  const int64_t rows = task.row_end - task.row_begin;
  const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t words = (task.panel_end - task.panel_begin) * kWordVectors;
  // Tiles of two heights, one apart; `first_row(i)` begins tile i.
  const auto first_row = [&](int64_t tile) { return tile * (rows / tiles) + std::min(tile, rows % tiles); };
  const int64_t group = std::max(fns[rows / tiles - 1].word_vectors, fns[first_row(1) - 1].word_vectors);
  for (int64_t step = 0; step < l.weight.steps(); step += l.k_block) {
    const int64_t steps = std::min(l.k_block, l.weight.steps() - step);
    const int64_t k = step * (kPairs ? 2 : 1);
    const int64_t row_words = steps * TileStepWords(kKind);
    if (packs) {
      const int64_t k_count = std::min(steps * (kPairs ? 2 : 1), l.x.width - k);
      for (int64_t i = 0; i < tiles; ++i) {
        PackTile<kKind>(l.x.row(task.row_begin + first_row(i)) + k, l.x.stride, first_row(i + 1) - first_row(i),
                        k_count, scratch + first_row(i) * row_words);
      }
    }
    for (int64_t word = 0; word < words; word += group) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t height = first_row(i + 1) - first_row(i);
        const TileFns& fn = fns[height - 1];
        const int64_t word_end = std::min(word + group, words);
        for (int64_t w = word; w < word_end;) {
          const bool wide = w + fn.word_vectors <= word_end;
          const int64_t panel = task.panel_begin + w / kWordVectors;
          const int64_t row = task.row_begin + first_row(i);
          (wide ? fn.wide : fn.single)({
              .x = packs ? scratch + first_row(i) * row_words : l.x.row(row) + k,
              .panel = l.weight.panel(panel) + step * step_bytes,
              .panel_bytes = l.weight.steps() * step_bytes,
              .steps = steps,
              .word_vector = static_cast<int>(w % kWordVectors),
              .out = l.out.row(row) + panel * kPanelFeatures,
              .stride = l.out.stride,
              .features = l.out.width - panel * kPanelFeatures,
              .resume = step > 0,
              .round = l.round && step + steps == l.weight.steps(),
          });
          w += wide ? fn.word_vectors : 1;
        }
      }
    }
  }
}

void RunTaskOfKind(TileKind kind, const LinearTask& l, const LinearPlan::Task& task, float* scratch) {
  switch (kind) {
    case TileKind::kF32:
      return RunTask<TileKind::kF32>(l, task, scratch);
    case TileKind::kBf16Halves:
      return RunTask<TileKind::kBf16Halves>(l, task, scratch);
    case TileKind::kPairsFma: {
      const FlushSubnormals flush;
      return RunTask<TileKind::kPairsFma>(l, task, scratch);
    }
    case TileKind::kPairsDot: {
      const FlushSubnormals flush;  // for the sum of the blocks
#if HWY_TARGET == HWY_AVX3
      return RunTask<TileKind::kPairsDot>(l, task, scratch);
#else
      LOCKSTEP_CHECK(false, "{} has no bf16 dot product", hwy::TargetName(HWY_TARGET));
#endif
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

HWY_EXPORT(RunTaskOfKind);
HWY_EXPORT(TileRowsOfTarget);

TileKind TileKindOf(PanelLayout layout) {
  switch (layout) {
    case PanelLayout::kF32:
      return TileKind::kF32;
    case PanelLayout::kBf16Halves:
      return TileKind::kBf16Halves;
    case PanelLayout::kBf16Pairs:
      break;
  }
  return HasBf16Dot() ? TileKind::kPairsDot : TileKind::kPairsFma;
}

// Of k, as oneDNN 3.12 cuts it for two rows and more. (A single row it always cuts in 512: here a row's bits do not
// depend on the others.)
int64_t PairsBlock(int64_t in_features) {
  return in_features <= 1024 ? 512 : 1024;
}

void RunLinear(const CpuContext& ctx, Rows x, const LinearWeight& packed, Rows out, DType rounding) {
  const auto& weight = static_cast<const CpuLinearWeight&>(packed);
  LOCKSTEP_CHECK(x.width == weight.in_features() && out.width == weight.out_features() && x.rows == out.rows,
                 "Linear: x [{}, {}], weight [{}, {}], out [{}, {}]", x.rows, x.width, weight.out_features(),
                 weight.in_features(), out.rows, out.width);
  LOCKSTEP_CHECK(weight.layout() == PanelLayoutOf(ctx.profile),
                 "Linear: the weight was packed for another profile than {}", ctx.profile.name);
  if (x.rows == 0) return;
  const TileKind kind = TileKindOf(weight.layout());
  const bool pairs = weight.layout() == PanelLayout::kBf16Pairs;
  const LinearPlan plan({.rows = x.rows,
                         .k_steps = weight.steps(),
                         .panels = weight.panels(),
                         .tile_rows = HWY_DYNAMIC_DISPATCH(TileRowsOfTarget)(),
                         .threads = ctx.threads.threads(),
                         .k_block = pairs ? PairsBlock(weight.in_features()) / 2 : 0,
                         .step_words = TileStepWords(kind)});
  const LinearTask task = {x, weight, out, rounding == DType::kBF16, plan.k_block()};
  const auto run_task = HWY_DYNAMIC_DISPATCH(RunTaskOfKind);
  const int64_t grain = plan.parallel() ? 1 : plan.tasks();
  ctx.threads.ParallelFor(plan.tasks(), grain, [&](int64_t begin, int64_t end, int thread) {
    float* scratch = ctx.scratch.Floats(thread, plan.scratch_words());
    for (int64_t i = begin; i < end; ++i) run_task(kind, task, plan.task(i), scratch);
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

#include "kernels/cpu/linear_plan.h"

#include <algorithm>

namespace lockstep {
namespace {

// Rows of x that share one pass over the weights.
constexpr int64_t kBlockRows = 192;
// A task's packed block of x: it stays in a core's L2 (1 MiB on current servers) beside the panel being used.
constexpr int64_t kBlockWords = int64_t{96} * 1024;
// Shorter runs over a panel leave the hardware prefetcher no time to get going.
constexpr int64_t kMinBlockK = 512;

// In steps of (row, k, panel): about a cycle each with AVX-512, two with AVX2. Below it a task costs little more than
// handing it out.
constexpr int64_t kTaskSteps = 16384;
// For balance, when cores are shared with others.
constexpr int64_t kTasksPerThread = 8;
// Every task packs its rows of x, which costs about half a panel's work.
constexpr int64_t kMinPanelsPerTask = 8;

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

LinearPlan::LinearPlan(const Shape& shape) : shape_(shape) {
  const int64_t step_limit = shape.k_block > 0 ? kBlockWords / (shape.k_block * shape.step_words) : kBlockRows;
  row_blocks_ = CeilDiv(shape.rows, std::min(kBlockRows, step_limit));
  const int64_t steps = shape.rows * shape.k_steps * shape.panels;
  const int64_t wanted =
      shape.threads == 1 ? 1 : std::clamp<int64_t>(steps / kTaskSteps, 1, kTasksPerThread * shape.threads);
  // One row is not packed, so its tasks may be as narrow as the widest tile, 4 panels.
  const int64_t min_panels = shape.rows == 1 ? 4 : kMinPanelsPerTask;
  const int64_t max_groups = std::max<int64_t>(1, shape.panels / min_panels);
  panel_groups_ = std::min(max_groups, CeilDiv(wanted, row_blocks_));
  // Still too few tasks: shorter row blocks, down to two tiles, then narrower groups than packing would like.
  if (row_blocks_ * panel_groups_ < wanted) {
    const int64_t max_blocks = std::max(row_blocks_, shape.rows / (2 * shape.tile_rows));
    row_blocks_ = std::min(max_blocks, CeilDiv(wanted, panel_groups_));
  }
  if (row_blocks_ * panel_groups_ < std::min<int64_t>(wanted, shape.threads)) {
    panel_groups_ = std::min(shape.panels, CeilDiv(shape.threads, row_blocks_));
  }
  // A few tasks, all alike: a number that the threads can share evenly.
  if (wanted > 1 && tasks() < int64_t{4} * shape.threads) {
    for (int64_t groups = panel_groups_; groups < std::min(panel_groups_ + shape.threads, shape.panels + 1); ++groups) {
      if (row_blocks_ * groups % shape.threads != 0) continue;
      panel_groups_ = groups;
      break;
    }
  }
  const int64_t block_rows = CeilDiv(shape.rows, row_blocks_);
  const int64_t k_block = shape.k_block > 0 ? shape.k_block : std::max(kMinBlockK, kBlockWords / block_rows);
  k_block_ = std::min(shape.k_steps, k_block);
}

LinearPlan::Task LinearPlan::task(int64_t index) const {
  const int64_t block = index / panel_groups_;
  const int64_t group = index % panel_groups_;
  return {.row_begin = shape_.rows * block / row_blocks_,
          .row_end = shape_.rows * (block + 1) / row_blocks_,
          .panel_begin = shape_.panels * group / panel_groups_,
          .panel_end = shape_.panels * (group + 1) / panel_groups_};
}

int64_t LinearPlan::scratch_words() const {
  return CeilDiv(shape_.rows, row_blocks_) * k_block_ * shape_.step_words;
}

}  // namespace lockstep

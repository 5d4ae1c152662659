// How one linear layer is cut into tasks: a pure function of its shape, with its own test. Results do not depend on any
// of it.
#pragma once

#include <cstdint>

namespace lockstep {

class LinearPlan {
 public:
  struct Shape {
    int64_t rows = 0;
    int64_t k_steps = 0;    // values of k, or pairs of them, as the weight's panels have it
    int64_t panels = 0;     // of 32 output features
    int64_t tile_rows = 0;  // rows of the instruction set's largest register tile
    int threads = 1;
    int64_t k_block = 0;     // steps between two stores of the accumulators; 0: the plan's choice
    int64_t step_words = 1;  // of x, per row and step
  };
  struct Task {
    int64_t row_begin = 0;
    int64_t row_end = 0;
    int64_t panel_begin = 0;
    int64_t panel_end = 0;
  };

  explicit LinearPlan(const Shape& shape);

  int64_t tasks() const { return row_blocks_ * panel_groups_; }
  // Tasks of one row block are neighbours, so that threads stream different weights.
  Task task(int64_t index) const;
  // Too little work for waking threads to pay.
  bool parallel() const { return tasks() > 1; }
  int64_t row_blocks() const { return row_blocks_; }
  int64_t panel_groups() const { return panel_groups_; }
  // Steps of k between two stores of the accumulators.
  int64_t k_block() const { return k_block_; }
  // A task's packed block of x.
  int64_t scratch_words() const;

 private:
  Shape shape_;
  int64_t row_blocks_ = 1;
  int64_t panel_groups_ = 1;
  int64_t k_block_ = 1;
};

}  // namespace lockstep

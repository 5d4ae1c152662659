// Points of the grid, batch x context: the steps of `batch` sequences after prompts of `context` tokens, timed or
// recorded.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "rollout/worker/local_model.h"
#include "tools/bench/cupti_library.h"
#include "tools/bench/kernel_table.h"
#include "tools/bench/traffic.h"

namespace lockstep {

struct PointShape {
  int64_t batch = 0, context = 0;
  int64_t samples = 1;           // of each prompt; divides `batch`
  int64_t steps = 0;             // decode steps
  int64_t max_batch_tokens = 0;  // prefill budget of a step

  int64_t prompts() const { return batch / samples; }
  int64_t prompt_tokens() const { return prompts() * context; }
};

struct PointTimes {
  double prefill_tok_s = 0;
  double step_ms = 0;  // mean decode step: chunk ends, which the floor counts, fall into one step of 64
  double median_ms = 0;
  double slowest_ms = 0;  // a chunk boundary
  double floor_ms = 0;
  double ratio() const { return step_ms / floor_ms; }
};

absl::StatusOr<PointTimes> TimePoint(LocalModel& model, const PointShape& shape, double bandwidth);

struct PointKernels {
  KernelTable decode, prefill;
};
// The same steps again, every kernel recorded; slower than those timed.
absl::StatusOr<PointKernels> RecordPoint(LocalModel& model, const PointShape& shape, const CuptiLibrary& cupti);

}  // namespace lockstep

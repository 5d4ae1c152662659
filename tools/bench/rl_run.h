// An RL step's rollouts on the engine itself, no service in between: run whole, or measured at some of their steps.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "rollout/worker/local_model.h"
#include "tools/bench/rl_schedule.h"

namespace lockstep {

struct RlOptions {
  RlShape shape;
  LoopConfig loop;           // what memory holds: FitRlMemory
  int64_t sample_steps = 0;  // 0: every step is run; else points to measure (step_samples.h)
};

struct RlResult {
  RlWalk walk;
  int64_t measured_steps = 0;
  double seconds = 0;
  double floor_seconds = 0;  // the steps' bytes at the device's own rate; prefill's arithmetic counts as nothing
  // Sampled runs only.
  double prefill_row_seconds = 0;
  double ratio_min = 0, ratio_max = 0;  // of decode steps over their floor, by window
};

// What is left of the device's memory: `memory_gb` GB, or if 0 the share that a worker takes (0.9 of a GPU's, half of a
// CPU's), as pages and slots for sequences of `tokens`.
absl::StatusOr<LoopConfig> FitRlMemory(const LocalModel& model, LoopConfig config, double memory_gb, int64_t tokens);

// How many sequences of `tokens` the memory holds at once.
int64_t SequencesThatFit(const LocalModel& model, const LoopConfig& config, int64_t tokens);

// bandwidth: bytes a second.
absl::StatusOr<RlResult> RunRl(LocalModel& model, const RlOptions& options, double bandwidth);

}  // namespace lockstep

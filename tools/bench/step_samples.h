// Which steps of a long run to measure, and the run's time from those measured.
//
// Decode steps: windows of consecutive steps, one in the middle of each of K equal parts of the bytes that decode steps
// move; in a window, measured time over the floor's is one ratio. A step between two windows takes its own floor times
// the ratio interpolated between theirs. Steps with prefill rows: K of them, spread over those rows; what they take
// beyond the same product, divided by their prefill rows, is the price of a prefill row everywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/bench/rl_schedule.h"

namespace lockstep {

struct StepWindow {
  int64_t begin = 0, end = 0;  // steps
};

struct SamplePlan {
  std::vector<StepWindow> windows;  // ascending, disjoint, each with a step of decode rows only
  std::vector<int64_t> mixed;       // ascending: steps with prefill rows
  std::vector<bool> chosen;         // by step: in either
  int64_t count() const;
};

// INVALID_ARGUMENT if no step has decode rows only. `points`: K, at least 1. `window`: steps, kGdnChunk of them hold
// one chunk end of every sequence.
absl::StatusOr<SamplePlan> PlanSamples(const std::vector<StepLoad>& steps, int64_t points, int64_t window);

struct Integrated {
  double seconds = 0;
  std::vector<double> ratios;  // by window: measured over floor
  double prefill_row_seconds = 0;
};

// seconds: by step, of those chosen; the rest is not read. bandwidth: bytes a second.
Integrated IntegrateSamples(const std::vector<StepLoad>& steps, const SamplePlan& plan,
                            const std::vector<double>& seconds, double bandwidth);

}  // namespace lockstep

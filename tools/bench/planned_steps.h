// Steps of a schedule on an engine, whichever of them are wanted: a step's rows read the keys, values and states that
// lie where the scheduler put the sequence, whether or not the steps before it ran. So its time is the run's; its
// tokens mean nothing. Not on a CPU with recurrent states: those count the rows they have seen, and refuse a gap.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "rollout/engine/engine.h"
#include "rollout/scheduler/scheduler.h"

namespace lockstep {

class PlannedSteps {
 public:
  // Fills every page and slot with keys, values and a state that the model computed of random tokens: memory whose
  // bits change like a run's. The engine has 2 slots at least and is used by nobody else.
  static absl::StatusOr<PlannedSteps> Create(Engine& engine, int64_t vocab, int64_t max_tokens);

  // Runs the plan; seconds, moves of states included.
  absl::StatusOr<double> Run(const StepPlan& plan, const Scheduler& scheduler);

 private:
  PlannedSteps(Engine& engine, int64_t vocab, int64_t max_tokens);
  absl::Status Fill();

  Engine* engine_;
  std::vector<int32_t> tokens_;  // of any sequence
  SamplingParams sampling_;
  LogprobOptions logprobs_;
  TokenHistory history_;
};

}  // namespace lockstep

// The steps of an RL rollout batch: every sample of every prompt, admitted, forked, preempted and ended by the
// scheduler's own rules. Knows lengths only, so a run of hours is walked in seconds; a step may be run on an engine
// between Plan and Apply.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "rollout/scheduler/scheduler.h"
#include "tools/bench/traffic.h"

namespace lockstep {

struct RlShape {
  int64_t prompts = 0;
  int64_t samples = 0;           // of each prompt
  int64_t prompt_tokens = 0;     // of every prompt
  std::vector<int64_t> lengths;  // generated tokens, by prompt * samples + sample; each at least 1

  int64_t generated() const;
};

// `count` lengths. sigma 0: all `limit`. Else log-normal with median limit / 2 and this sigma, cut off at `limit` and
// at 1; the same for the same arguments on every machine.
std::vector<int64_t> DrawLengths(int64_t count, int64_t limit, double sigma);

class RlSchedule {
 public:
  RlSchedule(const RlShape& shape, const SchedulerConfig& config);

  bool done() const { return sequences_.empty(); }
  // One step's rows; never empty of rows while not done().
  StepPlan Plan();
  // The plan has run: every sequence whose last known token it covers has one token more, or has ended.
  void Apply(const StepPlan& plan);

  const Scheduler& scheduler() const { return scheduler_; }
  int64_t preemptions() const { return preemptions_; }

 private:
  struct Sequence {
    int64_t left = 0;  // tokens still to generate
  };
  void Sampled(SequenceId id);

  Scheduler scheduler_;
  std::unordered_map<SequenceId, Sequence> sequences_;  // not ended
  int64_t preemptions_ = 0;
};

// One step, as a floor sees it.
struct StepLoad {
  double bytes = 0;          // it must move, at least: weights once; each piece's state; each page's keys and values
  int64_t prefill_rows = 0;  // in pieces of more than one row
  int64_t decode_rows = 0;
};

// Counts them. Samples of one prompt read the same pages of it, which then count once a step: what they share may stay
// in a cache, and a kernel could read it once for all.
class LoadCounter {
 public:
  LoadCounter(const Traffic& traffic, const SchedulerConfig& config, int64_t prompt_tokens);
  // Of a plan that `scheduler` has made and that is not applied yet.
  StepLoad Count(const StepPlan& plan, const Scheduler& scheduler);

 private:
  double KvBytes(const std::vector<int32_t>& pages, int64_t context);

  const Traffic& traffic_;
  const int64_t page_size_;
  const int64_t prompt_pages_;  // whole ones
  int64_t step_ = 0;
  std::vector<std::vector<int64_t>> read_;  // by window and page: the last step that read it
};

struct RlWalk {
  std::vector<StepLoad> steps;
  int64_t peak_running = 0;
  int64_t preemptions = 0;

  double bytes() const;
  int64_t prefill_rows() const;
  int64_t decode_rows() const;
  int64_t mixed_steps() const;  // with prefill rows
};
RlWalk WalkSchedule(const RlShape& shape, const SchedulerConfig& config, const Traffic& traffic);

}  // namespace lockstep

#include "tools/bench/rl_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>
#include <utility>

#include "rollout/base/check.h"

namespace lockstep {

int64_t RlShape::generated() const {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

std::vector<int64_t> DrawLengths(int64_t count, int64_t limit, double sigma) {
  std::vector<int64_t> lengths(static_cast<size_t>(count), limit);
  if (sigma == 0) return lengths;
  // Box and Muller's, since std::normal_distribution differs between libraries.
  std::mt19937_64 rng(1);
  const auto uniform = [&] { return (static_cast<double>(rng() >> 11) + 0.5) * 0x1p-53; };
  for (int64_t& length : lengths) {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    const double normal = radius * std::cos(2 * std::numbers::pi * uniform());
    const double drawn = static_cast<double>(limit) / 2 * std::exp(sigma * normal);
    length = static_cast<int64_t>(std::clamp(std::round(drawn), 1.0, static_cast<double>(limit)));
  }
  return lengths;
}

RlSchedule::RlSchedule(const RlShape& shape, const SchedulerConfig& config) : scheduler_(config) {
  LOCKSTEP_CHECK(static_cast<int64_t>(shape.lengths.size()) == shape.prompts * shape.samples, "{} lengths for {} x {}",
                 shape.lengths.size(), shape.prompts, shape.samples);
  SequenceId id = 1;
  for (int64_t prompt = 0; prompt < shape.prompts; ++prompt) {
    const uint64_t group = shape.samples > 1 ? id : 0;
    for (int64_t sample = 0; sample < shape.samples; ++sample, ++id) {
      scheduler_.Add({.id = id, .known = shape.prompt_tokens, .group = group});
      sequences_.emplace(id, Sequence{.left = shape.lengths[id - 1]});
    }
  }
}

StepPlan RlSchedule::Plan() {
  LOCKSTEP_CHECK(!done(), "a plan after the last sequence ended");
  while (true) {
    StepPlan plan = scheduler_.Plan();
    preemptions_ += static_cast<int64_t>(plan.preempted.size());
    if (!plan.empty()) return plan;
    LOCKSTEP_CHECK(!plan.preempted.empty(), "{} sequences wait and none can run", scheduler_.waiting());
  }
}

void RlSchedule::Apply(const StepPlan& plan) {
  scheduler_.Apply(plan);
  for (const PlannedPiece& piece : plan.pieces) {
    if (piece.last) Sampled(piece.id);
  }
  for (const Fork& fork : plan.forks) Sampled(fork.follower);
}

void RlSchedule::Sampled(SequenceId id) {
  const auto found = sequences_.find(id);
  if (--found->second.left > 0) {
    scheduler_.AppendToken(id);
    return;
  }
  scheduler_.Remove(id);
  sequences_.erase(found);
}

LoadCounter::LoadCounter(const Traffic& traffic, const SchedulerConfig& config, int64_t prompt_tokens)
    : traffic_(traffic),
      page_size_(config.page_size),
      prompt_pages_(config.pages == 0 ? 0 : prompt_tokens / config.page_size),
      read_(traffic.windows.size(), std::vector<int64_t>(static_cast<size_t>(config.pages), -1)) {}

double LoadCounter::KvBytes(const std::vector<int32_t>& pages, int64_t context) {
  double bytes = 0;
  for (size_t w = 0; w < traffic_.windows.size(); ++w) {
    const Traffic::Window& window = traffic_.windows[w];
    const int64_t first = window.keys > 0 ? std::max<int64_t>(context - window.keys, 0) : 0;
    const int64_t own = std::min(context, prompt_pages_ * page_size_);  // the first position that no other sample has
    int64_t positions = context - std::max(first, own);
    for (int64_t page = first / page_size_; page * page_size_ < own; ++page) {
      if (std::exchange(read_[w][pages[page]], step_) == step_) continue;
      positions += std::min((page + 1) * page_size_, own) - std::max(page * page_size_, first);
    }
    bytes += window.bytes * static_cast<double>(positions);
  }
  return bytes;
}

StepLoad LoadCounter::Count(const StepPlan& plan, const Scheduler& scheduler) {
  StepLoad load{.bytes = traffic_.weights};
  for (const PlannedPiece& piece : plan.pieces) {
    (piece.count > 1 ? load.prefill_rows : load.decode_rows) += piece.count;
    load.bytes += traffic_.state + KvBytes(scheduler.page_table(piece.id), piece.position + piece.count);
  }
  ++step_;
  return load;
}

double RlWalk::bytes() const {
  double sum = 0;
  for (const StepLoad& step : steps) sum += step.bytes;
  return sum;
}
int64_t RlWalk::prefill_rows() const {
  int64_t sum = 0;
  for (const StepLoad& step : steps) sum += step.prefill_rows;
  return sum;
}
int64_t RlWalk::decode_rows() const {
  int64_t sum = 0;
  for (const StepLoad& step : steps) sum += step.decode_rows;
  return sum;
}
int64_t RlWalk::mixed_steps() const {
  return std::count_if(steps.begin(), steps.end(), [](const StepLoad& step) { return step.prefill_rows > 0; });
}

RlWalk WalkSchedule(const RlShape& shape, const SchedulerConfig& config, const Traffic& traffic) {
  RlSchedule schedule(shape, config);
  LoadCounter counter(traffic, config, shape.prompt_tokens);
  RlWalk walk;
  while (!schedule.done()) {
    const StepPlan plan = schedule.Plan();
    walk.steps.push_back(counter.Count(plan, schedule.scheduler()));
    walk.peak_running = std::max(walk.peak_running, schedule.scheduler().running());
    schedule.Apply(plan);
  }
  walk.preemptions = schedule.preemptions();
  return walk;
}

}  // namespace lockstep

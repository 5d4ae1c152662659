#include "tools/bench/rl_run.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"
#include "rollout/model/forward.h"
#include "tools/bench/planned_steps.h"
#include "tools/bench/step_samples.h"
#include "tools/bench/traffic.h"

namespace lockstep {
namespace {

// One chunk end of every sequence, wherever in its chunk it stands.
constexpr int64_t kWindowSteps = kGdnChunk;

SchedulerConfig SchedulerOf(const Engine& engine, const LoopConfig& config) {
  return {.page_size = engine.config().page_size,
          .pages = engine.config().pages,
          .slots = engine.config().slots,
          .max_batch_tokens = config.max_batch_tokens};
}

// Counts a prompt's samples' tokens and ends each at its own length.
class LengthSink final : public RequestSink {
 public:
  explicit LengthSink(std::vector<int64_t> lengths) : left_(std::move(lengths)) {}
  void OnPromptLogprobs(PromptLogprobs) override {}
  void OnTokens(SampleTokens tokens) override {
    int64_t& left = left_[tokens.sample];
    left -= static_cast<int64_t>(tokens.tokens.size());
    if (left == 0) reached_.push_back(tokens.sample);
  }
  void OnSampleDone(int32_t sample, SampleResult result) override {
    if (result.finish == FinishKind::kAborted && result.abort == AbortReason::kInternal)
      error_ = absl::InternalError(absl::StrCat("sample ", sample, ": ", result.abort_message));
  }
  // Samples that have all their tokens, since the last call.
  std::vector<int32_t> TakeReached() { return std::exchange(reached_, {}); }
  const absl::Status& error() const { return error_; }

 private:
  std::vector<int64_t> left_;  // by sample
  std::vector<int32_t> reached_;
  absl::Status error_;
};

absl::StatusOr<double> RunWhole(const LocalModel& model, StepLoop& loop, const RlShape& shape, int64_t steps) {
  std::mt19937_64 rng(1);
  std::vector<std::pair<std::string, std::shared_ptr<LengthSink>>> requests;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t p = 0; p < shape.prompts; ++p) {
    RequestSpec r;
    r.request_id = absl::StrCat(p);
    r.n = static_cast<int32_t>(shape.samples);
    for (int64_t t = 0; t < shape.prompt_tokens; ++t)
      r.prompt.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(model.spec.vocab_size)));
    const auto lengths = shape.lengths.begin() + p * shape.samples;
    r.max_tokens = *std::max_element(lengths, lengths + shape.samples);
    r.logprobs = {.temperature = true};
    requests.emplace_back(r.request_id,
                          std::make_shared<LengthSink>(std::vector<int64_t>(lengths, lengths + shape.samples)));
    loop.Submit(std::move(r), requests.back().second, absl::Now());
  }
  while (loop.Step()) {
    loop.Deliver();  // the sinks tell which samples end
    for (const auto& [id, sink] : requests) {
      LOCKSTEP_RETURN_IF_ERROR(sink->error());
      for (const int32_t sample : sink->TakeReached()) loop.Abort(id, sample, AbortReason::kClient, absl::Now());
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  LOCKSTEP_RETURN_IF_ERROR(loop.failure());
  // The floor is that of the schedule as it was walked beforehand: it must have been this one.
  if (loop.Load().steps != steps || loop.Load().generated_tokens != shape.generated()) {
    return absl::InternalError(absl::StrCat("the run took ", loop.Load().steps, " steps for ",
                                            loop.Load().generated_tokens, " tokens; its schedule, walked beforehand, ",
                                            steps, " for ", shape.generated()));
  }
  return seconds;
}

// Whether a backend that records steps may have to record this one first: the number of rows, or the power of two above
// the longest sequence, is another than the last step's.
class NewSize {
 public:
  bool operator()(const StepPlan& plan) {
    int64_t longest = 0;
    for (const PlannedPiece& piece : plan.pieces) longest = std::max(longest, piece.position + piece.count);
    const std::pair<size_t, int> size(plan.pieces.size(), std::bit_width(static_cast<uint64_t>(longest - 1)));
    return std::exchange(last_, size) != size;
  }

 private:
  std::pair<size_t, int> last_ = {0, 0};
};

absl::Status RunSampled(const LocalModel& model, Engine& engine, const RlOptions& options, double bandwidth,
                        RlResult& result) {
  const RlShape& shape = options.shape;
  if (engine.config().slots < 2) {
    return absl::InvalidArgumentError(
        "--sample_steps: there is memory for one sequence, want two; leave the flag out to run every step");
  }
  LOCKSTEP_ASSIGN_OR_RETURN(const SamplePlan samples,
                            PlanSamples(result.walk.steps, options.sample_steps, kWindowSteps));
  const int64_t longest = *std::max_element(shape.lengths.begin(), shape.lengths.end());
  LOCKSTEP_ASSIGN_OR_RETURN(PlannedSteps steps,
                            PlannedSteps::Create(engine, model.spec.vocab_size, shape.prompt_tokens + longest));
  RlSchedule schedule(shape, SchedulerOf(engine, options.loop));
  NewSize new_size;
  std::vector<double> seconds(samples.chosen.size());
  for (size_t i = 0; !schedule.done(); ++i) {
    const StepPlan plan = schedule.Plan();
    if (samples.chosen[i]) {
      if (new_size(plan)) LOCKSTEP_RETURN_IF_ERROR(steps.Run(plan, schedule.scheduler()).status());
      LOCKSTEP_ASSIGN_OR_RETURN(seconds[i], steps.Run(plan, schedule.scheduler()));
    }
    schedule.Apply(plan);
  }
  const Integrated integrated = IntegrateSamples(result.walk.steps, samples, seconds, bandwidth);
  result.measured_steps = samples.count();
  result.seconds = integrated.seconds;
  result.prefill_row_seconds = integrated.prefill_row_seconds;
  const auto [least, most] = std::minmax_element(integrated.ratios.begin(), integrated.ratios.end());
  result.ratio_min = *least;
  result.ratio_max = *most;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LoopConfig> FitRlMemory(const LocalModel& model, LoopConfig config, double memory_gb, int64_t tokens) {
  // As MakeWorker plans it, without what weight updates take.
  const bool on_device = model.ops().reserved_memory() > 0;
  const auto share = static_cast<int64_t>((on_device ? 0.9 : 0.5) * static_cast<double>(model.ops().AvailableMemory()));
  const int64_t activations = ForwardPass::BufferBytes(model.spec, model.ops(), config.max_batch_tokens);
  return FitMemory(model, config,
                   memory_gb > 0 ? static_cast<int64_t>(memory_gb * 1e9) : share - (on_device ? activations : 0),
                   tokens);
}

int64_t SequencesThatFit(const LocalModel& model, const LoopConfig& config, int64_t tokens) {
  if (KvBytesPerPage(model.spec, model.ops(), config.page_size) == 0) return config.max_sequences;
  const int64_t pages = config.max_kv_tokens / config.page_size;
  return std::min(config.max_sequences, pages / ((tokens + config.page_size - 1) / config.page_size));
}

absl::StatusOr<RlResult> RunRl(LocalModel& model, const RlOptions& options, double bandwidth) {
  RlResult result;
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, MakeLocalLoop(model, options.loop));
  result.walk = WalkSchedule(options.shape, SchedulerOf(*local.engine, options.loop),
                             TrafficOf(model.spec, model.weights, model.ops()));
  result.floor_seconds = result.walk.bytes() / bandwidth;
  if (options.sample_steps > 0) {
    LOCKSTEP_RETURN_IF_ERROR(RunSampled(model, *local.engine, options, bandwidth, result));
    return result;
  }
  result.measured_steps = static_cast<int64_t>(result.walk.steps.size());
  LOCKSTEP_ASSIGN_OR_RETURN(
      result.seconds, RunWhole(model, *local.loop, options.shape, static_cast<int64_t>(result.walk.steps.size())));
  return result;
}

}  // namespace lockstep

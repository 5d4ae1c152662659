#include "tools/bench/point.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"
#include "tools/bench/kernel_recorder.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kPageSize = 64;

double Milliseconds(Clock::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}

// A loop with the point's requests in flight.
absl::StatusOr<LocalLoop> Begin(LocalModel& model, const PointShape& shape) {
  const auto [batch, context, samples, steps, max_batch_tokens] = shape;
  // Sequences whose prompts are done decode on while the others prefill: each may take a token in every such step.
  const int64_t prefill_steps = shape.prompt_tokens() / std::max(max_batch_tokens, batch) + 2;
  const int64_t length = context + prefill_steps + steps + 2;
  if (length > model.spec.max_position) {
    return absl::InvalidArgumentError(absl::StrCat("--context: value ", context, " with ", length - context,
                                                   " new tokens exceeds the model's ", model.spec.max_position));
  }
  const LoopConfig config{
      .page_size = kPageSize,
      .max_batch_tokens = std::max(max_batch_tokens, batch),
      .max_sequences = batch,
      .max_kv_tokens = batch * (length + 192)};  // with the page per running sequence that admission leaves free
  LOCKSTEP_ASSIGN_OR_RETURN(LocalLoop local, MakeLocalLoop(model, config));
  std::mt19937_64 rng(1);
  for (int64_t i = 0; i < shape.prompts(); ++i) {
    RequestSpec r;
    r.request_id = absl::StrCat(i);
    for (int64_t t = 0; t < context; ++t)
      r.prompt.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(model.spec.vocab_size)));
    r.n = static_cast<int32_t>(samples);
    r.max_tokens = prefill_steps + steps + 2;
    r.logprobs = {.temperature = true};
    local.loop->Submit(std::move(r), std::make_shared<CollectingSink>(r.n), absl::Now());
  }
  return local;
}

// Decode rows ride along in prefill steps, so the prompts are done when every sequence has its first token.
bool Prefilling(const LocalLoop& local, const PointShape& shape) {
  return local.loop->Load().prefill_tokens < shape.prompt_tokens();
}

// Bytes of a decode step of the point. What samples share of a prompt, whole pages, counts once.
double StepBytes(const Traffic& traffic, const PointShape& shape) {
  const int64_t own = shape.context % kPageSize;  // the positions after them, which a window sees first
  return traffic.DecodeStepBytes(shape.batch, shape.context) -
         static_cast<double>(shape.batch - shape.prompts()) * (traffic.KvBytes(shape.context) - traffic.KvBytes(own));
}

// What the step between two loads worked on. Prompts are prefilled one after the other; a decode row's context is taken
// as that of the point, give or take the tokens it has generated.
ProfiledStep StepBetween(const WorkerLoad& before, const WorkerLoad& after, const PointShape& shape,
                         const Traffic& traffic, const Ops& ops) {
  const int64_t prompt_rows = after.prefill_tokens - before.prefill_tokens;
  const int64_t prompts_done = after.prefill_tokens / shape.context - before.prefill_tokens / shape.context;
  const auto flops = [&](int64_t tokens) {
    const int64_t whole = tokens / shape.context;
    return static_cast<double>(whole) * traffic.PromptAttentionFlops(shape.context) +
           traffic.PromptAttentionFlops(tokens % shape.context);
  };
  ProfiledStep step;
  // A prompt's last row gives every sample its first token.
  step.decode_rows = after.generated_tokens - before.generated_tokens - prompts_done * shape.samples;
  step.logit_rows = step.decode_rows + prompts_done;
  step.head_blocks = (step.logit_rows + ops.max_logit_rows() - 1) / ops.max_logit_rows();
  step.rows = prompt_rows + step.decode_rows;
  const int64_t generated = after.generated_tokens / shape.batch;
  step.decode_kv_bytes = static_cast<double>(step.decode_rows) * traffic.KvBytes(shape.context + generated);
  step.shared = traffic.SharedBytes(ops.shared_attention());
  step.prompt_attention_flops = flops(after.prefill_tokens) - flops(before.prefill_tokens);
  return step;
}

}  // namespace

absl::StatusOr<PointTimes> TimePoint(LocalModel& model, const PointShape& shape, double bandwidth) {
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, Begin(model, shape));
  PointTimes point;
  auto start = Clock::now();
  while (Prefilling(local, shape)) local.loop->Step();
  point.prefill_tok_s = static_cast<double>(shape.prompt_tokens()) / Milliseconds(Clock::now() - start) * 1e3;
  std::vector<double> times;
  while (static_cast<int64_t>(times.size()) <= shape.steps && local.loop->Load().running_sequences == shape.batch) {
    start = Clock::now();
    local.loop->Step();
    times.push_back(Milliseconds(Clock::now() - start));
  }
  if (times.size() < 2)
    return absl::InvalidArgumentError("--steps: too few; all sequences ended while others prefilled; want more");
  times.erase(times.begin());  // may be the first of its size: recorded, not only run
  std::sort(times.begin(), times.end());
  point.step_ms = std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
  point.median_ms = times[times.size() / 2];
  point.slowest_ms = times.back();
  const Traffic traffic = TrafficOf(model.spec, model.weights, model.ops());
  point.floor_ms = StepBytes(traffic, shape) / bandwidth * 1e3;
  return point;
}

absl::StatusOr<PointKernels> RecordPoint(LocalModel& model, const PointShape& shape, const CuptiLibrary& cupti) {
  const Traffic traffic = TrafficOf(model.spec, model.weights, model.ops());
  const KernelTable empty(LinearProducts(model.spec, model.weights), traffic);
  PointKernels kernels{empty, empty};
  LOCKSTEP_ASSIGN_OR_RETURN(KernelRecorder recorder, KernelRecorder::Start(cupti));
  // After Start: the new engine's graphs are recorded while CUPTI watches.
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, Begin(model, shape));
  bool first_decode = true;
  const auto step = [&](KernelTable& table, bool keep) -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(recorder.Take().status());  // what set the step up
    const WorkerLoad before = local.loop->Load();
    local.loop->Step();
    LOCKSTEP_RETURN_IF_ERROR(local.loop->failure());
    LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<KernelLaunch> launches, recorder.Take());
    if (keep) {
      table.AddStep(StepBetween(before, local.loop->Load(), shape, traffic, model.ops()), launches);
    }
    return absl::OkStatus();
  };
  while (Prefilling(local, shape)) LOCKSTEP_RETURN_IF_ERROR(step(kernels.prefill, true));
  while (kernels.decode.steps() < shape.steps && local.loop->Load().running_sequences == shape.batch) {
    LOCKSTEP_RETURN_IF_ERROR(step(kernels.decode, !first_decode));
    first_decode = false;
  }
  LOCKSTEP_RETURN_IF_ERROR(recorder.Stop());
  if (kernels.decode.steps() == 0)
    return absl::InvalidArgumentError("--steps: too few; all sequences ended while others prefilled; want more");
  return kernels;
}

}  // namespace lockstep

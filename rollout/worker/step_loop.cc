#include "rollout/worker/step_loop.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "rollout/base/check.h"
#include "rollout/base/failpoint.h"

namespace lockstep {

struct StepLoop::Request {
  uint64_t number = 0;  // RowTask::request
  RequestSpec spec;
  std::shared_ptr<RequestSink> sink;
  absl::Time submitted;
  absl::Time expiry;  // of the time budget
  uint64_t prompt_hash = 0;
  LogprobOptions forced_options;       // for prompt log-probabilities: the kinds that need no draw
  int64_t next_prompt_logprob = 0;     // first position of the range not delivered yet
  int64_t planned_prompt_logprob = 0;  // the same, the step in preparation included
  PromptLogprobs step_prompt_logprobs;
  std::optional<VersionSpan> prompt_span;  // of what was delivered
  std::vector<SequenceId> live;

  bool partly_scored() const {
    return next_prompt_logprob > spec.prompt_logprobs.begin && next_prompt_logprob < spec.prompt_logprobs.end;
  }
};

struct StepLoop::Sequence {
  SequenceId id = 0;
  Request* request = nullptr;
  int32_t sample = 0;
  TokenHistory history;
  StopMatcher stop;
  SampleCounters counters;
  absl::Time admitted = absl::InfinitePast();
  absl::Time first_token = absl::InfinitePast();
  absl::Time last_token = absl::InfinitePast();
  WeightVersion state_version;  // under which the state was begun
  std::vector<VersionSpan> spans;
  std::vector<std::byte> swapped;  // the state of a kept sequence while it has no slot
};

StepLoop::StepLoop(Engine& engine, const SchedulerConfig& config, const TokenBytes* token_bytes)
    : engine_(engine), scheduler_(config), token_bytes_(token_bytes) {
  LOCKSTEP_CHECK(config.page_size == engine.config().page_size && config.pages == engine.config().pages &&
                     config.slots == engine.config().slots && config.max_batch_tokens <= engine.config().max_rows,
                 "scheduler and engine disagree on memory");
  totals_.kv_pages_total = config.pages;
  totals_.state_slots_total = config.slots;
}

StepLoop::~StepLoop() = default;

absl::Status StepLoop::CheckFits(const RequestSpec& spec) const {
  // The last generated token is never fed back, so it needs no place.
  const int64_t tokens = spec.n == 0 ? static_cast<int64_t>(spec.prompt.size())
                                     : static_cast<int64_t>(spec.prompt.size()) + spec.max_tokens - 1;
  return scheduler_.CheckFits(tokens);
}

void StepLoop::Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink, absl::Time now) {
  LOCKSTEP_CHECK(!requests_.contains(spec.request_id), "request {} is in flight", spec.request_id);
  LOCKSTEP_CHECK(spec.stop.stop_strings.empty() || token_bytes_ != nullptr, "stop strings without a tokenizer");
  auto request = std::make_unique<Request>();
  request->number = engine_.BeginRequest();
  request->sink = std::move(sink);
  request->submitted = now;
  request->expiry = now + spec.time_budget;
  request->prompt_hash = PromptHash(spec.prompt);
  request->next_prompt_logprob = request->planned_prompt_logprob = spec.prompt_logprobs.begin;
  request->forced_options = spec.logprobs;
  request->forced_options.processed = false;
  request->forced_options.kept_token_ids = false;
  request->spec = std::move(spec);
  const RequestSpec& s = request->spec;

  const bool scoring = s.n == 0;
  const bool penalties = NeedsCounts(s.sampling);
  const uint64_t group = s.n > 1 ? next_id_ : 0;
  StopMatcher stop(s.stop, s.sampling.min_tokens, token_bytes_);
  // Counted once for all samples: no step runs meanwhile.
  TokenHistory history(s.prompt, penalties);
  for (int32_t token : s.generated_prefix) {
    history.Append(token);
    stop.Replay(token);
  }
  for (int32_t i = 0; i < std::max(s.n, 1); ++i) {
    auto sequence = std::unique_ptr<Sequence>(new Sequence{next_id_++, request.get(), i, history, stop, {}});
    int64_t known = static_cast<int64_t>(s.prompt.size() + s.generated_prefix.size());
    // Row p scores position p + 1, so the last position asked for needs the rows before it only.
    if (scoring) known = std::max<int64_t>(s.prompt_logprobs.end - 1, 1);
    scheduler_.Add({.id = sequence->id, .known = known, .priority = s.priority, .samples = !scoring, .group = group});
    request->live.push_back(sequence->id);
    sequences_.emplace(sequence->id, std::move(sequence));
  }
  if (request->expiry < absl::InfiniteFuture()) expiries_.emplace(request->expiry, s.request_id);
  const std::string id = s.request_id;
  requests_.emplace(id, std::move(request));
}

void StepLoop::Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason, absl::Time now) {
  AbortSamples(request_id, sample, reason, now);
  Deliver();
}

void StepLoop::AbortSamples(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason,
                            absl::Time now) {
  auto it = requests_.find(request_id);
  if (it == requests_.end()) return;
  for (SequenceId id : std::vector<SequenceId>(it->second->live)) {
    Sequence& sequence = Get(id);
    if (sample && sequence.sample != *sample) continue;
    FinishAborted(sequence, reason, reason == AbortReason::kInternal ? std::string(failure_.message()) : "", now);
  }
}

void StepLoop::AbortAll(AbortReason reason, absl::Time now) {
  std::vector<std::string> ids;
  for (const auto& [id, request] : requests_) ids.push_back(id);
  for (const std::string& id : ids) AbortSamples(id, std::nullopt, reason, now);
  Deliver();
}

absl::Time StepLoop::Expire(absl::Time now) {
  const bool expired = !expiries_.empty() && expiries_.begin()->first <= now;
  while (!expiries_.empty() && expiries_.begin()->first <= now) {
    const std::string id = expiries_.begin()->second;
    AbortSamples(id, std::nullopt, AbortReason::kTimeBudget, now);
  }
  if (expired) Deliver();
  return expiries_.empty() ? absl::InfiniteFuture() : expiries_.begin()->first;
}

void StepLoop::Deliver() {
  outbox_.Deliver();
  last_results_ = absl::InfinitePast();
}

WeightSwitchResult StepLoop::SwitchWeights(const WeightVersion& version, InFlightPolicy policy, absl::Time now) {
  LOCKSTEP_CHECK(policy != InFlightPolicy::kFinish, "kFinish is not for the step loop");
  WeightSwitchResult counts;
  std::vector<SequenceId> ids;
  for (const auto& [id, sequence] : sequences_) {
    // Prompt log-probabilities are the request's: whoever of it has not started would go on with them.
    if (scheduler_.has_started(id) || sequence->request->partly_scored()) ids.push_back(id);
  }
  for (const SequenceId id : ids) {
    Failpoint("weights.commit.sample");
    Sequence& sequence = Get(id);
    const bool partly_scored = sequence.request->partly_scored();
    const bool generated = !sequence.spans.empty();
    if (policy == InFlightPolicy::kAbort || partly_scored) {
      ++counts.aborted;
      FinishAborted(sequence, AbortReason::kWeightUpdate,
                    absl::StrCat("the weights became version ", VersionText(version),
                                 policy == InFlightPolicy::kAbort
                                     ? " with policy ABORT"
                                     : " while prompt log-probabilities were computed; send the request again"),
                    now);
    } else if (policy == InFlightPolicy::kKeep && generated && scheduler_.has_whole_state(id)) {
      scheduler_.Keep(id);
      ++counts.kept;
    } else {
      scheduler_.Restart(id);
      std::vector<std::byte>().swap(sequence.swapped);
      ++counts.recomputed;
    }
  }
  Deliver();
  weight_version_ = version;
  weights_since_ = now;
  return counts;
}

void StepLoop::PlanPromptLogprobs(Sequence& sequence, int64_t piece_index, const PlannedPiece& piece) {
  Request& request = *sequence.request;
  const int64_t end = std::min(request.spec.prompt_logprobs.end, piece.position + piece.count + 1);
  // A recomputed or second sequence passes over positions that were delivered already.
  if (request.planned_prompt_logprob < piece.position + 1) return;
  for (int64_t& position = request.planned_prompt_logprob; position < end; ++position) {
    tasks_.push_back({.piece = piece_index,
                      .row = position - 1 - piece.position,
                      .request = request.number,
                      .params = &request.spec.sampling,
                      .options = &request.forced_options,
                      .history = &sequence.history,
                      .key = {},
                      .forced = true,
                      .forced_token = sequence.history.tokens()[position]});
    owners_.push_back({sequence.id, true});
  }
}

void StepLoop::PlanSample(Sequence& sequence, int64_t piece_index, const PlannedPiece& piece) {
  const RequestSpec& spec = sequence.request->spec;
  tasks_.push_back({.piece = piece_index,
                    .row = piece.count - 1,
                    .request = sequence.request->number,
                    .params = &spec.sampling,
                    .options = &spec.logprobs,
                    .history = &sequence.history,
                    .key = {.seed = spec.sampling.seed,
                            .prompt_hash = sequence.request->prompt_hash,
                            .sample_index = static_cast<uint32_t>(spec.first_sample_index + sequence.sample),
                            .position = static_cast<uint32_t>(sequence.history.generated())},
                    .forced = false,
                    .forced_token = 0});
  owners_.push_back({sequence.id, false});
}

bool StepLoop::Step() {
  if (!failure_.ok()) {
    AbortAll(AbortReason::kInternal, absl::Now());
    return false;
  }
  const absl::Time start = absl::Now();
  const StepPlan& plan = scheduler_.Plan();
  for (SequenceId id : plan.preempted) {
    ++Get(id).counters.preemptions;
    ++totals_.preemptions;
  }
  stalled_ = plan.empty() && !idle() && scheduler_.held() && scheduler_.started() == 0;
  if (plan.empty()) Deliver();
  if (plan.empty() && plan.swapped_out.empty()) {
    LOCKSTEP_CHECK(idle() || stalled_ || !plan.preempted.empty() || scheduler_.config().disturb_seed,
                   "{} sequences wait and none can run", scheduler_.waiting());
    return !idle();
  }

  saves_.clear();
  restores_.clear();
  // What was swapped out is its sequence's, which may not have ended since the plan.
  for (const Swap& swap : plan.swapped_out) saves_.push_back({swap.slot, swap.pages, &Get(swap.id).swapped});
  for (const Swap& swap : plan.swapped_in) restores_.push_back({swap.slot, swap.pages, &Get(swap.id).swapped});
  pieces_.clear();
  tasks_.clear();
  owners_.clear();
  copies_.clear();
  scored_.clear();
  int64_t prefill_tokens = 0;
  for (size_t i = 0; i < plan.pieces.size(); ++i) {
    const PlannedPiece& piece = plan.pieces[i];
    Sequence& sequence = Get(piece.id);
    if (sequence.admitted == absl::InfinitePast()) sequence.admitted = start;
    if (piece.position == 0) sequence.state_version = weight_version_;
    pieces_.push_back({.position = piece.position,
                       .tokens = sequence.history.tokens().subspan(piece.position, piece.count),
                       .slot = scheduler_.slot(piece.id),
                       .pages = scheduler_.page_table(piece.id)});
    PlanPromptLogprobs(sequence, static_cast<int64_t>(i), piece);
    const RequestSpec& spec = sequence.request->spec;
    prefill_tokens += std::clamp<int64_t>(static_cast<int64_t>(spec.prompt.size()) - piece.position, 0, piece.count);
    if (piece.last && spec.n > 0) PlanSample(sequence, static_cast<int64_t>(i), piece);
    if (piece.last && spec.n == 0) scored_.push_back(piece.id);
    for (const Fork& fork : plan.forks) {
      if (fork.leader != piece.id) continue;
      Sequence& follower = Get(fork.follower);
      follower.admitted = start;
      follower.state_version = sequence.state_version;
      follower.counters.cached_prompt_tokens =
          std::min(piece.position + piece.count, static_cast<int64_t>(spec.prompt.size()));
      PlanSample(follower, static_cast<int64_t>(i), piece);
      copies_.push_back({fork.from_slot, fork.to_slot, fork.from_page, fork.to_page});
    }
  }
  const absl::Time idle_since = last_results_ == absl::InfinitePast() ? start : last_results_;
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> step = engine_.Step({.saves = saves_,
                                                                                 .reset_slots = plan.reset_slots,
                                                                                 .restores = restores_,
                                                                                 .pieces = pieces_,
                                                                                 .tasks = tasks_,
                                                                                 .copies = copies_},
                                                                                [this] { outbox_.Deliver(); });
  scheduler_.Apply(plan);
  if (!step.ok()) {
    failure_ = step.status();
    AbortAll(AbortReason::kInternal, absl::Now());
    return false;
  }
  std::vector<absl::StatusOr<SampledToken>>& results = *step;

  const absl::Time now = absl::Now();
  last_results_ = now;
  if (!plan.empty()) totals_.host_ms += absl::ToDoubleMilliseconds(engine_.begun() - idle_since);
  for (size_t t = 0; t < results.size(); ++t) {
    auto it = sequences_.find(owners_[t].sequence);
    if (it == sequences_.end()) continue;  // ended by an earlier result of this step
    Sequence& sequence = *it->second;
    if (!owners_[t].forced) {
      OnSampled(sequence, std::move(results[t]), now);
    } else if (!results[t].ok()) {
      OnForcedFailure(*sequence.request, results[t].status(), now);
    } else {
      Request& request = *sequence.request;
      request.step_prompt_logprobs.logprobs.push_back(std::move(results[t]->logprobs));
      // The last row of the piece, or of the range: hand over what this step scored.
      const bool more = t + 1 < results.size() && owners_[t + 1].forced && owners_[t + 1].sequence == sequence.id;
      if (more) continue;
      PromptLogprobs batch = std::exchange(request.step_prompt_logprobs, {});
      batch.begin = request.next_prompt_logprob;
      request.next_prompt_logprob += static_cast<int64_t>(batch.logprobs.size());
      // One span: a request that is partly scored does not outlive its weights.
      request.prompt_span = {weight_version_, sequence.state_version, request.spec.prompt_logprobs.begin,
                             request.next_prompt_logprob};
      outbox_.Add(request.sink, std::move(batch));
    }
  }
  totals_.prefill_tokens += prefill_tokens;
  for (const SequenceId id : scored_) {
    const auto it = sequences_.find(id);
    if (it != sequences_.end()) Finish(*it->second, {.finish = FinishKind::kScored}, now);
  }
  ++totals_.steps;
  totals_.last_step_ms = absl::ToDoubleMilliseconds(absl::Now() - start);
  totals_.steps_ms += totals_.last_step_ms;
  if (idle()) Deliver();
  return true;
}

// Every sample of the request stands on the prompt that cannot be scored, and none may fill the gap.
void StepLoop::OnForcedFailure(Request& request, const absl::Status& failure, absl::Time now) {
  request.step_prompt_logprobs.logprobs.clear();
  for (const SequenceId id : std::vector<SequenceId>(request.live)) {
    totals_.non_finite_samples += absl::IsInternal(failure);
    FinishAborted(Get(id), AbortReason::kInternal, std::string(failure.message()), now);
  }
}

void StepLoop::OnSampled(Sequence& sequence, absl::StatusOr<SampledToken> sampled, absl::Time now) {
  if (!sampled.ok()) {
    totals_.non_finite_samples += absl::IsInternal(sampled.status());
    FinishAborted(sequence, AbortReason::kInternal, std::string(sampled.status().message()), now);
    return;
  }
  Request& request = *sequence.request;
  const int64_t offset = sequence.history.generated();
  sequence.history.Append(sampled->token);
  if (sequence.first_token == absl::InfinitePast()) sequence.first_token = now;
  sequence.last_token = now;
  ++totals_.generated_tokens;
  if (sequence.spans.empty() || sequence.spans.back().weights != weight_version_ ||
      sequence.spans.back().state != sequence.state_version) {
    sequence.spans.push_back({weight_version_, sequence.state_version, offset, offset});
  }
  sequence.spans.back().end = offset + 1;
  const int32_t token = sampled->token;
  outbox_.Add(request.sink, sequence.sample, offset, *std::move(sampled));

  if (std::optional<StopMatch> match = sequence.stop.Append(token)) {
    Finish(sequence, {.finish = FinishKind::kStop, .stop = *match}, now);
  } else if (offset + 1 >= request.spec.max_tokens) {
    Finish(sequence,
           {.finish = FinishKind::kLength,
            .length = request.spec.max_tokens_is_context ? LengthReason::kContext : LengthReason::kMaxTokens},
           now);
  } else {
    scheduler_.AppendToken(sequence.id);
  }
}

void StepLoop::FinishAborted(Sequence& sequence, AbortReason reason, std::string message, absl::Time now) {
  SampleResult result{.finish = FinishKind::kAborted, .abort = reason};
  result.abort_message = std::move(message);
  Finish(sequence, std::move(result), now);
}

void StepLoop::Finish(Sequence& sequence, SampleResult result, absl::Time now) {
  Request& request = *sequence.request;
  result.spans = std::move(sequence.spans);
  result.prompt_span = request.prompt_span;
  const bool admitted = sequence.admitted != absl::InfinitePast();
  const bool started = sequence.first_token != absl::InfinitePast();
  sequence.counters.queue_time = (admitted ? sequence.admitted : now) - request.submitted;
  if (admitted) sequence.counters.prefill_time = (started ? sequence.first_token : now) - sequence.admitted;
  if (started) sequence.counters.decode_time = sequence.last_token - sequence.first_token;
  result.counters = sequence.counters;

  const SequenceId id = sequence.id;
  const int32_t sample = sequence.sample;
  scheduler_.Remove(id);
  std::erase(request.live, id);
  const std::shared_ptr<RequestSink> sink = request.sink;
  if (request.live.empty()) {
    auto [begin, end] = expiries_.equal_range(request.expiry);
    for (auto it = begin; it != end; ++it) {
      if (it->second == request.spec.request_id) {
        expiries_.erase(it);
        break;
      }
    }
    const std::string request_id = request.spec.request_id;
    sequences_.erase(id);
    engine_.EndRequest(request.number);
    requests_.erase(request_id);
  } else {
    sequences_.erase(id);
  }
  outbox_.Add(sink, sample, std::move(result));
}

WorkerLoad StepLoop::Load() const {
  WorkerLoad load = totals_;
  load.weights_since = weights_since_;
  load.running_sequences = scheduler_.running();
  load.waiting_sequences = scheduler_.waiting();
  load.running_requests = static_cast<int64_t>(requests_.size());
  load.kv_pages_used = scheduler_.pages_used();
  load.state_slots_used = scheduler_.slots_used();
  return load;
}

}  // namespace lockstep

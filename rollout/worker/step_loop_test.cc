// The step loop on a random model: ends, time budgets, aborts, groups and errors. Bits are tests/property's business.
#include "rollout/worker/step_loop.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"
#include "tests/testing/failing_backend.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

class StepLoopTest : public testing::Test {
 protected:
  StepLoopTest() : model_(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1)) {
    MakeLoop({.max_sequences = 8, .max_kv_tokens = 4096});
  }

  void MakeLoop(const LoopConfig& config) {
    auto local = MakeLocalLoop(*model_, config);
    ASSERT_TRUE(local.ok()) << local.status();
    local_ = *std::move(local);
  }

  RequestSpec Request(const std::string& id, int64_t prompt, int64_t max_tokens, int32_t n = 1) {
    RequestSpec r;
    r.request_id = id;
    for (int64_t i = 0; i < prompt; ++i)
      r.prompt.push_back(static_cast<int32_t>((7 * i + 3) % model_->spec.vocab_size));
    r.max_tokens = max_tokens;
    r.n = n;
    r.sampling.seed = 11;
    return r;
  }

  std::shared_ptr<CollectingSink> Submit(const RequestSpec& request, absl::Time now = absl::Now()) {
    auto sink = std::make_shared<CollectingSink>(std::max(request.n, 1));
    loop().Submit(request, sink, now);
    return sink;
  }

  StepLoop& loop() { return *local_.loop; }

  std::unique_ptr<LocalModel> model_;
  LocalLoop local_;
};

TEST_F(StepLoopTest, EndsAtMaxTokensAndFreesEverything) {
  const auto sink = Submit(Request("a", 10, 5));
  while (loop().Step()) {
  }
  const CollectedSample& s = sink->samples()[0];
  EXPECT_EQ(s.tokens.size(), 5u);
  EXPECT_EQ(s.result.finish, FinishKind::kLength);
  EXPECT_EQ(s.result.length, LengthReason::kMaxTokens);
  ASSERT_EQ(s.result.spans.size(), 1u);
  EXPECT_EQ(s.result.spans[0].end, 5);
  EXPECT_TRUE(loop().idle());
  EXPECT_EQ(loop().Load().kv_pages_used, 0);
  EXPECT_EQ(loop().Load().state_slots_used, 0);
}

TEST_F(StepLoopTest, ContextLimitIsNamed) {
  RequestSpec r = Request("a", 10, 3);
  r.max_tokens_is_context = true;
  const auto sink = Submit(r);
  while (loop().Step()) {
  }
  EXPECT_EQ(sink->samples()[0].result.length, LengthReason::kContext);
}

TEST_F(StepLoopTest, StopTokenEndsAndIsIncluded) {
  const auto free = Submit(Request("a", 10, 20));
  while (loop().Step()) {
  }
  RequestSpec r = Request("b", 10, 20);
  const int32_t third = free->samples()[0].tokens[2];
  r.stop.stop_token_ids = {third};
  const auto sink = Submit(r);
  while (loop().Step()) {
  }
  const CollectedSample& s = sink->samples()[0];
  EXPECT_EQ(s.result.finish, FinishKind::kStop);
  EXPECT_EQ(s.result.stop.kind, StopKind::kTokenId);
  EXPECT_EQ(s.tokens.back(), third);
  EXPECT_LE(s.tokens.size(), 3u);
}

TEST_F(StepLoopTest, WhatAGroupSharesOfItsGeneratedPrefixIsNotCountedAsPrompt) {
  RequestSpec spec = Request("a", 100, 20, 2);
  spec.generated_prefix = {1, 2, 3};
  const auto sink = Submit(std::move(spec));
  while (loop().Step()) {
  }
  EXPECT_EQ(sink->samples()[1].result.counters.cached_prompt_tokens, 100);
}

TEST_F(StepLoopTest, AGroupSharesItsPrefillAndDrawsDifferently) {
  const auto sink = Submit(Request("a", 100, 20, 4));
  while (loop().Step()) {
  }
  EXPECT_EQ(loop().Load().prefill_tokens, 100);
  for (int i = 1; i < 4; ++i) {
    EXPECT_EQ(sink->samples()[i].result.counters.cached_prompt_tokens, 100);
    EXPECT_NE(sink->samples()[i].tokens, sink->samples()[0].tokens);
  }
}

TEST_F(StepLoopTest, AContinuedPartialGivesWhatTheWholeWouldHave) {
  const auto whole = Submit(Request("a", 30, 40));
  while (loop().Step()) {
  }
  RequestSpec r = Request("b", 30, 40);
  const std::vector<int32_t>& tokens = whole->samples()[0].tokens;
  r.generated_prefix.assign(tokens.begin(), tokens.begin() + 17);
  const auto rest = Submit(r);
  while (loop().Step()) {
  }
  EXPECT_EQ(rest->samples()[0].tokens, std::vector<int32_t>(tokens.begin() + 17, tokens.end()));
  EXPECT_EQ(rest->samples()[0].result.spans[0].begin, 17);
}

TEST_F(StepLoopTest, TimeBudgetsKeepWhatWasGenerated) {
  const absl::Time now = absl::Now();
  RequestSpec shorter = Request("shorter", 10, 1000), longer = Request("longer", 10, 1000);
  shorter.time_budget = absl::Hours(1);
  longer.time_budget = absl::Hours(2);
  const auto a = Submit(shorter, now), b = Submit(longer, now);
  for (int i = 0; i < 5; ++i) loop().Step();
  EXPECT_EQ(loop().Expire(now + absl::Minutes(59)), now + absl::Hours(1));
  EXPECT_EQ(loop().Expire(now + absl::Minutes(61)), now + absl::Hours(2));
  EXPECT_EQ(loop().Expire(now + absl::Minutes(121)), absl::InfiniteFuture());
  EXPECT_TRUE(loop().idle());
  EXPECT_EQ(a->samples()[0].result.abort, AbortReason::kTimeBudget);
  EXPECT_EQ(b->samples()[0].result.abort, AbortReason::kTimeBudget);
  EXPECT_EQ(a->samples()[0].tokens.size(), 5u);
  EXPECT_EQ(loop().Load().state_slots_used, 0);
}

TEST_F(StepLoopTest, HandsOverWhatAStepFoundInTheNextOrWhenAsked) {
  const auto sink = Submit(Request("a", 10, 4));
  const std::vector<int32_t>& tokens = sink->samples()[0].tokens;
  loop().Step();
  EXPECT_EQ(tokens.size(), 0u);
  loop().Step();
  EXPECT_EQ(tokens.size(), 1u);
  loop().Deliver();
  EXPECT_EQ(tokens.size(), 2u);
  loop().Step();
  EXPECT_EQ(tokens.size(), 2u);
  loop().Step();
  EXPECT_EQ(tokens.size(), 4u) << "the last step's at once, since none follows";
  EXPECT_TRUE(sink->samples()[0].done);
  EXPECT_GT(loop().Load().host_ms, 0);
  EXPECT_LT(loop().Load().host_ms, loop().Load().steps_ms);
}

TEST_F(StepLoopTest, AbortEndsOneSampleOrAll) {
  const auto sink = Submit(Request("a", 10, 1000, 3));
  for (int i = 0; i < 4; ++i) loop().Step();
  loop().Abort("a", 1, AbortReason::kClient, absl::Now());
  EXPECT_TRUE(sink->samples()[1].done);
  EXPECT_FALSE(sink->samples()[0].done);
  loop().Step();
  loop().Abort("unknown", std::nullopt, AbortReason::kClient, absl::Now());
  loop().Abort("a", std::nullopt, AbortReason::kCancelled, absl::Now());
  EXPECT_EQ(sink->samples()[2].result.abort, AbortReason::kCancelled);
  EXPECT_TRUE(loop().idle());
}

TEST_F(StepLoopTest, AbortingALeaderInPrefillLosesNothingOfTheOthers) {
  MakeLoop({.max_batch_tokens = 16, .max_sequences = 8, .max_kv_tokens = 4096});
  RequestSpec r = Request("a", 100, 5, 3);
  r.prompt_logprobs = {1, 100};
  r.logprobs = {.raw = true};
  const auto alone = Submit(r);
  while (loop().Step()) {
  }
  const auto sink = Submit(r);
  for (int i = 0; i < 3; ++i) loop().Step();
  loop().Abort("a", 0, AbortReason::kClient, absl::Now());
  while (loop().Step()) {
  }
  EXPECT_EQ(sink->prompt_logprobs().size(), 99u);
  for (size_t i = 0; i < 99; ++i) EXPECT_EQ(sink->prompt_logprobs()[i].raw, alone->prompt_logprobs()[i].raw);
  for (int i = 1; i < 3; ++i) EXPECT_EQ(sink->samples()[i].tokens, alone->samples()[i].tokens);
}

TEST_F(StepLoopTest, NonFiniteLogitsAbortTheSampleAndNameTheReason) {
  std::vector<float> norm(model_->spec.hidden_size, 1.0f);
  norm[0] = std::numeric_limits<float>::quiet_NaN();
  model_->weights.final_norm = *model_->ops().PackVector(norm, /*exact=*/true);
  const auto sink = Submit(Request("a", 10, 5, 2));
  while (loop().Step()) {
  }
  for (const CollectedSample& s : sink->samples()) {
    EXPECT_EQ(s.result.finish, FinishKind::kAborted);
    EXPECT_EQ(s.result.abort, AbortReason::kInternal);
    EXPECT_FALSE(s.result.abort_message.empty());
  }
  EXPECT_EQ(loop().Load().non_finite_samples, 2);
  EXPECT_TRUE(loop().idle());
}

TEST_F(StepLoopTest, AFailedDeviceEndsEveryRequestWithTheOperationsName) {
  local_ = {};
  model_->backend = MakeFailingBackend(model_->ops().profile(), model_->threads.get(), /*steps=*/3);
  MakeLoop({.max_sequences = 8, .max_kv_tokens = 4096});
  const auto a = Submit(Request("a", 10, 50, 2)), b = Submit(Request("b", 20, 50));
  while (loop().Step()) {
  }
  EXPECT_EQ(loop().failure().message(), kDeviceFailure);
  // Later ones end at once: no step computes anything any more.
  const auto late = Submit(Request("c", 5, 5));
  EXPECT_FALSE(loop().Step());
  EXPECT_TRUE(loop().idle());
  for (const auto& sink : {a, b, late}) {
    for (const CollectedSample& s : sink->samples()) {
      ASSERT_TRUE(s.done);
      EXPECT_EQ(s.result.finish, FinishKind::kAborted);
      EXPECT_EQ(s.result.abort, AbortReason::kInternal);
      EXPECT_EQ(s.result.abort_message, kDeviceFailure);
    }
  }
  EXPECT_EQ(a->samples()[0].tokens.size(), 3u);  // of the steps that succeeded, and none after
  EXPECT_TRUE(late->samples()[0].tokens.empty());
}

TEST_F(StepLoopTest, AFailedSamplerIsAFailedDevice) {
  local_ = {};
  model_->backend = MakeFailingSamplerBackend(model_->ops().profile(), model_->threads.get(), /*steps=*/3);
  MakeLoop({.max_sequences = 8, .max_kv_tokens = 4096});
  const auto a = Submit(Request("a", 10, 50, 2));
  while (loop().Step()) {
  }
  EXPECT_EQ(loop().failure().message(), kSamplerFailure) << "or later requests would end one by one";
  EXPECT_TRUE(loop().idle());
  for (const CollectedSample& s : a->samples()) {
    EXPECT_EQ(s.tokens.size(), 3u);
    EXPECT_EQ(s.result.abort, AbortReason::kInternal);
    EXPECT_EQ(s.result.abort_message, kSamplerFailure);
  }
}

// What a sampler that keeps something of requests is told: their numbers, one set of parameters each, and their ends.
struct Kept {
  std::map<uint64_t, const SamplingParams*> now;
  int64_t ended = 0;
};

class KeepingSampler final : public RowSampler {
 public:
  KeepingSampler(std::unique_ptr<RowSampler> rows, int64_t requests, Kept* kept)
      : rows_(std::move(rows)), requests_(requests), kept_(*kept) {}
  void Enqueue(Rows logits, std::span<const SampleTask> tasks) override {
    for (const SampleTask& t : tasks) {
      const uint64_t request = t.task->request;
      EXPECT_GT(request, 0u);
      const auto [entry, fresh] = kept_.now.try_emplace(request, t.task->params);
      EXPECT_EQ(entry->second, t.task->params);
      EXPECT_TRUE(!fresh || !numbers_.contains(request)) << "after its end";
      numbers_.insert(request);
      step_.insert(request);
    }
    EXPECT_LE(static_cast<int64_t>(step_.size()), requests_);
    rows_->Enqueue(logits, tasks);
  }
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override {
    step_.clear();
    return rows_->Collect();
  }
  void Forget(uint64_t request) override {
    kept_.now.erase(request);
    ++kept_.ended;
  }

 private:
  std::unique_ptr<RowSampler> rows_;
  const int64_t requests_;
  Kept& kept_;
  std::set<uint64_t> numbers_, step_;
};

class KeepingBackend final : public Backend {
 public:
  KeepingBackend(std::unique_ptr<Backend> cpu, Kept* kept) : cpu_(std::move(cpu)), kept_(kept) {}
  std::string device() const override { return cpu_->device(); }
  Ops& ops() override { return cpu_->ops(); }
  absl::StatusOr<double> MeasureBandwidth() override { return cpu_->MeasureBandwidth(); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t vocab, int64_t requests) override {
    LOCKSTEP_ASSIGN_OR_RETURN(auto rows, cpu_->MakeSampler(vocab, requests));
    return std::make_unique<KeepingSampler>(std::move(rows), requests, kept_);
  }

 private:
  std::unique_ptr<Backend> cpu_;
  Kept* kept_;
};

// However they end, and whatever they share: nothing is kept of a request that has ended, and no step is of more
// requests than sequences run.
TEST_F(StepLoopTest, ASamplerIsToldOfEveryRequestAndItsEnd) {
  local_ = {};
  Kept kept;
  model_->backend = std::make_unique<KeepingBackend>(std::move(model_->backend), &kept);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    kept = {};
    // Room for few: some are preempted, and what is held of them stays.
    MakeLoop({.max_batch_tokens = 64, .max_sequences = 3, .max_kv_tokens = 512, .disturb_seed = seed});
    for (int i = 0; i < 6; ++i) {
      RequestSpec r = Request(absl::StrCat("r", i), 20 + 30 * i, 40, 1 + i % 3);
      if (i % 2 == 0) r.prompt_logprobs = {1, 10};
      r.logprobs.raw = true;
      r.sampling.allowed_token_ids = {3, 4, 5};
      Submit(r);
    }
    RequestSpec score = Request("score", 50, 0, 0);
    score.prompt_logprobs = {1, 50};
    score.logprobs.raw = true;
    Submit(score);
    for (int i = 0; i < 25; ++i) loop().Step();
    loop().Abort("r1", 0, AbortReason::kClient, absl::Now());
    loop().Abort("r5", std::nullopt, AbortReason::kClient, absl::Now());
    EXPECT_FALSE(kept.now.empty());
    while (loop().Step()) {
    }
    EXPECT_TRUE(kept.now.empty());
    EXPECT_EQ(kept.ended, 7);
  }
  local_ = {};
}

TEST_F(StepLoopTest, ScoringOnePositionOrNoneEnds) {
  for (const PromptLogprobRange range :
       {PromptLogprobRange{1, 1}, PromptLogprobRange{1, 2}, PromptLogprobRange{99, 100}}) {
    RequestSpec r = Request("a", 100, 0, 0);
    r.prompt_logprobs = range;
    r.logprobs = {.raw = true};
    const auto sink = Submit(r);
    while (loop().Step()) {
    }
    EXPECT_EQ(sink->samples()[0].result.finish, FinishKind::kScored);
    EXPECT_EQ(static_cast<int64_t>(sink->prompt_logprobs().size()), range.end - range.begin);
  }
}

TEST_F(StepLoopTest, WhatCanNeverFitIsRefused) {
  MakeLoop({.page_size = 64, .max_sequences = 2, .max_kv_tokens = 128});
  EXPECT_TRUE(loop().CheckFits(Request("a", 100, 29)).ok());
  EXPECT_EQ(loop().CheckFits(Request("a", 100, 30)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(StepLoopTest, SixtyFourThousandTokensInLittleMemory) {
  // Long contexts: only slots and pages grow. One state slot, KV pages for the length, and activations for a step.
  local_ = {};  // before the model it stands on
  model_ = MakeRandomModel(ModelKind::kAllGdn, "fp32", 1, 1);
  model_->spec.max_position = 1 << 17;
  MakeLoop({.max_batch_tokens = 512, .max_sequences = 1});
  const int64_t memory = local_.engine->memory().total();
  const auto sink = Submit(Request("a", 65536, 3));
  while (loop().Step()) {
  }
  EXPECT_EQ(sink->samples()[0].tokens.size(), 3u);
  EXPECT_EQ(local_.engine->memory().total(), memory);
  EXPECT_EQ(local_.engine->memory().kv_pages, 0);
}

// A kept state cannot be computed again: preempted at random and in want of memory, it is moved out and back, and what
// follows has the bits of a run that nothing disturbed. The weights themselves stay the same here.
TEST_F(StepLoopTest, KeptSequencesAreSwappedNotRecomputed) {
  constexpr int kRequests = 5;
  const auto run = [&](const LoopConfig& config, int64_t* preemptions) {
    MakeLoop(config);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < kRequests; ++i) {
      RequestSpec r = Request(absl::StrCat("r", i), 30 + 17 * i, 120);
      r.logprobs.raw = true;
      r.sampling.seed = 100 + i;
      sinks.push_back(Submit(r));
    }
    const auto least = [&] {
      size_t tokens = 1000;
      for (const auto& sink : sinks) tokens = std::min(tokens, sink->samples()[0].tokens.size());
      return tokens;
    };
    while (least() < 20) loop().Step();
    const WeightSwitchResult result = loop().SwitchWeights({0, 1}, InFlightPolicy::kKeep, absl::Now());
    EXPECT_EQ(result.aborted, 0);
    if (preemptions == nullptr) {
      EXPECT_EQ(result.kept, kRequests);
    }
    const int64_t before = loop().Load().preemptions;
    while (loop().Step()) {
    }
    if (preemptions != nullptr) *preemptions += loop().Load().preemptions - before;
    EXPECT_EQ(loop().Load().kv_pages_used, 0);
    EXPECT_EQ(loop().Load().state_slots_used, 0);
    return sinks;
  };
  const auto calm = run({.max_sequences = 8, .max_kv_tokens = 4096}, nullptr);
  int64_t preemptions = 0, kept = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    // Half the runs: room for a few of the sequences only.
    const auto disturbed = run({.max_batch_tokens = 64,
                                .max_sequences = seed % 2 == 0 ? 3 : 8,
                                .max_kv_tokens = seed % 2 == 0 ? 640 : 4096,
                                .disturb_seed = seed},
                               &preemptions);
    for (int i = 0; i < kRequests; ++i) {
      const CollectedSample &want = calm[i]->samples()[0], &got = disturbed[i]->samples()[0];
      ASSERT_TRUE(got.done);
      ASSERT_EQ(got.tokens, want.tokens) << "seed " << seed << ", request " << i;
      for (size_t t = 0; t < want.tokens.size(); ++t) ASSERT_EQ(got.logprobs[t].raw, want.logprobs[t].raw);
      const VersionSpan& last = got.result.spans.back();
      kept += last.weights == WeightVersion{0, 1} && last.state == WeightVersion{};
    }
  }
  EXPECT_GT(preemptions, 20);
  EXPECT_GT(kept, 15);
}

TEST_F(StepLoopTest, HeldSamplesWaitAndStartedOnesFinish) {
  const auto first = Submit(Request("a", 10, 30));
  ASSERT_TRUE(loop().Step());
  loop().HoldNew(true);
  const auto second = Submit(Request("b", 10, 5));
  EXPECT_EQ(loop().in_flight(), 1);
  while (loop().Step() && !loop().stalled()) {
  }
  EXPECT_TRUE(first->samples()[0].done);
  EXPECT_TRUE(second->samples()[0].tokens.empty());
  EXPECT_EQ(loop().in_flight(), 0);
  EXPECT_FALSE(loop().idle());
  loop().HoldNew(false);
  while (loop().Step()) {
  }
  EXPECT_TRUE(second->samples()[0].done);
}

TEST_F(StepLoopTest, AHalfDeliveredScoreEndsWithTheSwitch) {
  MakeLoop({.max_batch_tokens = 16, .max_sequences = 2, .max_kv_tokens = 512});
  RequestSpec r = Request("a", 100, 0);
  r.n = 0;
  r.logprobs.raw = true;
  r.prompt_logprobs = {1, 100};
  const auto sink = Submit(r);
  ASSERT_TRUE(loop().Step());
  const WeightSwitchResult result = loop().SwitchWeights({0, 1}, InFlightPolicy::kRecompute, absl::Now());
  EXPECT_EQ(result.aborted, 1);
  ASSERT_TRUE(sink->samples()[0].done);
  EXPECT_EQ(sink->samples()[0].result.abort, AbortReason::kWeightUpdate);
  EXPECT_TRUE(loop().idle());
}

// Whoever pairs them must be able to tell: the second sample starts after the switch.
TEST_F(StepLoopTest, APromptsScoresSayTheirWeights) {
  MakeLoop({.max_batch_tokens = 128, .max_sequences = 1, .max_kv_tokens = 512});
  RequestSpec r = Request("a", 100, 5, 2);
  r.logprobs.raw = true;
  r.prompt_logprobs = {1, 100};
  const auto sink = Submit(r);
  RequestSpec score = Request("b", 100, 0);
  score.n = 0;
  score.logprobs.raw = true;
  score.prompt_logprobs = {1, 50};
  const auto scored = Submit(score);
  while (sink->prompt_logprobs().size() < 99) ASSERT_TRUE(loop().Step());
  loop().SwitchWeights({0, 1}, InFlightPolicy::kRecompute, absl::Now());
  while (loop().Step()) {
  }
  const SampleResult& second = sink->samples()[1].result;
  ASSERT_TRUE(second.prompt_span);
  EXPECT_EQ(second.prompt_span->weights, (WeightVersion{0, 0}));
  EXPECT_EQ(second.prompt_span->state, (WeightVersion{0, 0}));
  EXPECT_EQ(second.prompt_span->begin, 1);
  EXPECT_EQ(second.prompt_span->end, 100);
  ASSERT_EQ(second.spans.size(), 1u);
  EXPECT_EQ(second.spans[0].weights, (WeightVersion{0, 1}));
  const SampleResult& later = scored->samples()[0].result;
  ASSERT_TRUE(later.prompt_span);
  EXPECT_EQ(later.prompt_span->weights, (WeightVersion{0, 1}));
  EXPECT_EQ(later.prompt_span->end, 50);
}

// The samples that wait for the one that prefills would go on with the range where it stopped.
TEST_F(StepLoopTest, AHalfScoredPromptEndsWithTheSwitchForEverySample) {
  for (const bool led : {true, false}) {
    MakeLoop({.max_batch_tokens = 16, .max_sequences = 8, .max_kv_tokens = 4096});
    RequestSpec r = Request("a", 100, 5, 3);
    r.logprobs.raw = true;
    r.prompt_logprobs = {1, 100};
    const auto sink = Submit(r);
    ASSERT_TRUE(loop().Step());
    // Without it no sample of the request has started.
    if (!led) loop().Abort("a", 0, AbortReason::kClient, absl::Now());
    const WeightSwitchResult result = loop().SwitchWeights({0, 1}, InFlightPolicy::kRecompute, absl::Now());
    EXPECT_EQ(result.aborted, led ? 3 : 2);
    for (int i = led ? 0 : 1; i < 3; ++i) {
      ASSERT_TRUE(sink->samples()[i].done);
      EXPECT_EQ(sink->samples()[i].result.abort, AbortReason::kWeightUpdate);
    }
    EXPECT_TRUE(loop().idle());
    EXPECT_EQ(sink->prompt_logprobs().size(), 16u);
  }
}

TEST_F(StepLoopTest, APromptThatCannotBeScoredEndsEverySample) {
  const RequestSpec plain = Request("a", 128, 5, 2);
  local_ = {};
  model_->backend =
      MakeNonFiniteBackend(model_->ops().profile(), model_->threads.get(), /*forced_token=*/plain.prompt[10]);
  MakeLoop({.max_batch_tokens = 64, .max_sequences = 8, .max_kv_tokens = 4096});
  RequestSpec r = plain;
  r.logprobs.raw = true;
  r.prompt_logprobs = {1, 128};
  const auto sink = Submit(r);
  while (loop().Step()) {
  }
  EXPECT_TRUE(sink->prompt_logprobs().empty()) << "of positions that are not those it says";
  for (const CollectedSample& s : sink->samples()) {
    ASSERT_TRUE(s.done);
    EXPECT_EQ(s.result.finish, FinishKind::kAborted);
    EXPECT_EQ(s.result.abort, AbortReason::kInternal);
    EXPECT_EQ(s.result.abort_message, kNotFinite);
  }
  EXPECT_EQ(loop().Load().non_finite_samples, 2);
  EXPECT_EQ(loop().Load().state_slots_used, 0);
}

}  // namespace
}  // namespace lockstep

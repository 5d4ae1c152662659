// docs/numerics.md, "What must always hold", 1 and 2: for random models, requests and schedules, Generate's tokens and
// log-probabilities do not depend on the batch, the prefill budget, page size, thread count, preemption, forks or
// order; and Score gives the same bits for the same tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : rng_(seed) {}
  int64_t Pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng_() % static_cast<uint64_t>(high - low + 1));
  }
  bool Chance(int percent) { return Pick(0, 99) < percent; }
  template <typename T>
  void Shuffle(std::vector<T>& v) {
    std::shuffle(v.begin(), v.end(), rng_);
  }

 private:
  std::mt19937_64 rng_;
};

std::vector<RequestSpec> RandomRequests(const ModelSpec& spec, Random& random) {
  std::vector<RequestSpec> requests;
  for (int i = 0; i < 4; ++i) {
    RequestSpec r;
    r.request_id = absl::StrCat("r", i);
    const int64_t length = random.Chance(50) ? random.Pick(1, 40) : random.Pick(41, 150);
    for (int64_t t = 0; t < length; ++t) r.prompt.push_back(static_cast<int32_t>(random.Pick(0, spec.vocab_size - 1)));
    for (int64_t t = random.Chance(30) ? random.Pick(1, 20) : 0; t > 0; --t) {
      r.generated_prefix.push_back(static_cast<int32_t>(random.Pick(0, spec.vocab_size - 1)));
    }
    r.n = random.Chance(40) ? static_cast<int32_t>(random.Pick(2, 4)) : 1;
    r.first_sample_index = static_cast<int32_t>(random.Pick(0, 3));
    r.max_tokens = static_cast<int64_t>(r.generated_prefix.size()) + random.Pick(1, 50);
    r.priority = static_cast<int32_t>(random.Pick(0, 2));
    SamplingParams& s = r.sampling;
    s.seed = static_cast<uint64_t>(random.Pick(0, 1 << 30));
    s.temperature = random.Chance(20) ? 0.0f : 0.3f + 0.1f * static_cast<float>(random.Pick(0, 12));
    if (random.Chance(30)) s.top_k = static_cast<int32_t>(random.Pick(1, 60));
    if (random.Chance(30)) s.top_p = 0.05f * static_cast<float>(random.Pick(2, 19));
    if (random.Chance(20)) s.min_p = 0.02f;
    if (random.Chance(20)) s.repetition_penalty = 1.3f;
    if (random.Chance(20)) s.frequency_penalty = 0.4f;
    r.logprobs = {
        .raw = true, .temperature = true, .processed = true, .top_k = static_cast<int32_t>(random.Pick(0, 3))};
    if (random.Chance(30))
      r.stop.stop_token_ids = s.stop_token_ids = {static_cast<int32_t>(random.Pick(0, spec.vocab_size - 1))};
    if (random.Chance(40) && length > 1) {
      r.prompt_logprobs.begin = random.Pick(1, length - 1);
      r.prompt_logprobs.end = random.Pick(r.prompt_logprobs.begin, length);
    }
    requests.push_back(std::move(r));
  }
  return requests;
}

// The same tokens, teacher-forced: prompt ++ prefix ++ generated, all positions scored.
RequestSpec ScoreOf(const RequestSpec& r, const CollectedSample& sample) {
  RequestSpec score;
  score.request_id = "score";
  score.prompt = r.prompt;
  score.prompt.insert(score.prompt.end(), r.generated_prefix.begin(), r.generated_prefix.end());
  score.prompt.insert(score.prompt.end(), sample.tokens.begin(), sample.tokens.end());
  score.n = 0;
  score.sampling.temperature = r.sampling.temperature;
  score.logprobs = {.raw = true, .temperature = true, .top_k = r.logprobs.top_k};
  score.prompt_logprobs = {1, static_cast<int64_t>(score.prompt.size())};
  return score;
}

bool SameBits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

bool SameTop(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const TokenLogprob& x, const TokenLogprob& y) {
    return x.token == y.token && SameBits(x.logprob, y.logprob);
  });
}

// What teacher forcing can know of a row.
bool SameScores(const RowLogprobs& a, const RowLogprobs& b) {
  return SameBits(a.raw, b.raw) && SameBits(a.temperature, b.temperature) && SameTop(a.top_raw, b.top_raw) &&
         SameTop(a.top_temperature, b.top_temperature);
}

LoopConfig RandomLoop(Random& random) {
  LoopConfig config;
  config.page_size = 16 * random.Pick(1, 4);
  config.max_batch_tokens = random.Chance(15) ? random.Pick(1, 8) : random.Pick(9, 300);
  config.max_sequences = random.Pick(1, 10);
  // From room for one sequence, which preempts all the time, to room for all. Prompt, prefix and completion are at most
  // 220 tokens.
  config.max_kv_tokens = random.Chance(50) ? 224 + random.Pick(0, 100) : 4000;
  if (random.Chance(60)) config.disturb_seed = static_cast<uint64_t>(random.Pick(0, 1 << 30));
  return config;
}

struct Tally {
  int64_t schedules = 0, tokens = 0, scored = 0, preemptions = 0, forked = 0;
};

void CheckModel(ModelKind kind, const std::string& numerics, uint64_t seed, int schedules, Tally& tally) {
  Random random(seed);
  const std::unique_ptr<LocalModel> model = MakeRandomModel(kind, numerics, seed, 1);
  const std::unique_ptr<LocalModel> threaded = MakeRandomModel(kind, numerics, seed, 3);
  std::vector<RequestSpec> requests = RandomRequests(model->spec, random);

  // The reference: every request alone, prompts in one piece.
  std::vector<std::shared_ptr<CollectingSink>> expected;
  for (const RequestSpec& request : requests) {
    auto loop =
        MakeLocalLoop(*model, {.page_size = 64, .max_batch_tokens = 4096, .max_sequences = 16, .max_kv_tokens = 4096});
    ASSERT_TRUE(loop.ok()) << loop.status();
    expected.push_back(RunAll(*loop->loop, {request})[0]);
  }

  // Score = Generate.
  for (size_t i = 0; i < requests.size(); ++i) {
    auto loop = MakeLocalLoop(*model, RandomLoop(random));
    ASSERT_TRUE(loop.ok()) << loop.status();
    for (const CollectedSample& sample : expected[i]->samples()) {
      ASSERT_TRUE(sample.done);
      ASSERT_NE(sample.result.finish, FinishKind::kAborted) << sample.result.abort_message;
      ASSERT_FALSE(sample.tokens.empty());
      const RequestSpec score = ScoreOf(requests[i], sample);
      const auto sink = RunAll(*loop->loop, {score})[0];
      const size_t first = requests[i].prompt.size() + requests[i].generated_prefix.size();
      ASSERT_EQ(sink->prompt_logprobs().size() + 1, score.prompt.size());
      for (size_t t = 0; t < sample.tokens.size(); ++t) {
        ASSERT_TRUE(SameScores(sample.logprobs[t], sink->prompt_logprobs()[first + t - 1]))
            << "Score differs from Generate at token " << t << ": " << sink->prompt_logprobs()[first + t - 1].raw
            << " against " << sample.logprobs[t].raw;
        ++tally.scored;
      }
      const PromptLogprobRange range = requests[i].prompt_logprobs;
      ASSERT_EQ(static_cast<int64_t>(expected[i]->prompt_logprobs().size()), range.end - range.begin);
      for (int64_t p = range.begin; p < range.end; ++p) {
        ASSERT_TRUE(SameScores(expected[i]->prompt_logprobs()[p - range.begin], sink->prompt_logprobs()[p - 1]))
            << "prompt position " << p;
      }
    }
  }

  // The same requests in random schedules.
  for (int s = 0; s < schedules; ++s) {
    LocalModel& m = random.Chance(30) ? *threaded : *model;
    const LoopConfig config = RandomLoop(random);
    auto loop = MakeLocalLoop(m, config);
    ASSERT_TRUE(loop.ok()) << loop.status();
    std::vector<size_t> order(requests.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    random.Shuffle(order);
    std::vector<RequestSpec> shuffled;
    for (size_t i : order) shuffled.push_back(requests[i]);
    const auto sinks = RunAll(*loop->loop, shuffled);
    ++tally.schedules;
    for (size_t i = 0; i < order.size(); ++i) {
      const CollectingSink& want = *expected[order[i]];
      for (size_t sample = 0; sample < want.samples().size(); ++sample) {
        const CollectedSample& a = want.samples()[sample];
        const CollectedSample& b = sinks[i]->samples()[sample];
        ASSERT_TRUE(b.done);
        ASSERT_EQ(a.tokens, b.tokens) << "request " << order[i] << " sample " << sample << ", schedule " << s
                                      << ", page_size " << config.page_size << ", max_batch_tokens "
                                      << config.max_batch_tokens;
        ASSERT_EQ(a.result.finish, b.result.finish);
        for (size_t t = 0; t < a.tokens.size(); ++t) {
          ASSERT_TRUE(SameScores(a.logprobs[t], b.logprobs[t]) &&
                      SameBits(a.logprobs[t].processed, b.logprobs[t].processed))
              << "token " << t;
        }
        tally.tokens += static_cast<int64_t>(a.tokens.size());
        tally.preemptions += b.result.counters.preemptions;
        tally.forked += b.result.counters.cached_prompt_tokens > 0;
      }
      ASSERT_EQ(want.prompt_logprobs().size(), sinks[i]->prompt_logprobs().size());
      for (size_t p = 0; p < want.prompt_logprobs().size(); ++p) {
        ASSERT_TRUE(SameScores(want.prompt_logprobs()[p], sinks[i]->prompt_logprobs()[p]))
            << "prompt log-probability " << p;
      }
    }
  }
}

TEST(Invariance, GenerateEqualsItselfAndScoreUnderRandomSchedules) {
  Tally tally;
  uint64_t seed = 1;
  // 3 profiles x 4 models x 3 sets of requests x 6 schedules = 216 schedules.
  for (const NumericsProfile& profile : NumericsProfiles()) {
    for (ModelKind kind : AllModelKinds()) {
      for (int set = 0; set < 3; ++set, ++seed) {
        SCOPED_TRACE(testing::Message() << ModelKindName(kind) << ", " << profile.name << ", seed " << seed);
        CheckModel(kind, std::string(profile.name), seed, 6, tally);
        if (HasFatalFailure()) return;
      }
    }
  }
  std::printf(
      "%ld schedules, %ld generated tokens compared, %ld scored; %ld preemptions, %ld forked samples; 0 differing "
      "bits\n",
      static_cast<long>(tally.schedules), static_cast<long>(tally.tokens), static_cast<long>(tally.scored),
      static_cast<long>(tally.preemptions), static_cast<long>(tally.forked));
  EXPECT_GE(tally.schedules, 200);
  EXPECT_GT(tally.preemptions, 100) << "the schedules did not preempt: the test lost its point";
  EXPECT_GT(tally.forked, 100) << "no sample was forked: the test lost its point";
}

// The test can fail: one flipped weight bit changes results.
TEST(Invariance, AnotherModelGivesOtherBits) {
  const auto a = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  const auto b = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  std::unique_ptr<VectorWeight>& a_log = b->weights.layers[0].gdn.a_log;
  std::vector<float> nudged(a_log->floats(), a_log->floats() + a_log->size());
  nudged[0] = std::nextafter(nudged[0], 10.0f);
  a_log = *b->ops().PackVector(nudged, /*exact=*/true);
  Random random(7);
  std::vector<RequestSpec> requests = RandomRequests(a->spec, random);
  const RequestSpec score = ScoreOf(requests[0], {.tokens = std::vector<int32_t>(64, 5)});
  const LoopConfig config{.max_kv_tokens = 4096};
  auto loop_a = MakeLocalLoop(*a, config), loop_b = MakeLocalLoop(*b, config);
  const auto x = RunAll(*loop_a->loop, {score})[0], y = RunAll(*loop_b->loop, {score})[0];
  int64_t differing = 0;
  for (size_t i = 0; i < x->prompt_logprobs().size(); ++i)
    differing += !SameScores(x->prompt_logprobs()[i], y->prompt_logprobs()[i]);
  EXPECT_GT(differing, 0);
}

}  // namespace
}  // namespace lockstep

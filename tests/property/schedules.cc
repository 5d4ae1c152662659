#include "tests/property/schedules.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>

#include "absl/strings/str_cat.h"

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

bool SameBits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

bool SameTop(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const TokenLogprob& x, const TokenLogprob& y) {
    return x.token == y.token && SameBits(x.logprob, y.logprob);
  });
}

LoopConfig RandomLoop(int64_t page_multiple, Random& random) {
  LoopConfig config;
  config.page_size = page_multiple * random.Pick(1, 4);
  config.max_batch_tokens = random.Chance(15) ? random.Pick(1, 8) : random.Pick(9, 300);
  config.max_sequences = random.Pick(1, 10);
  // From room for one sequence, which preempts all the time, to room for all. Prompt, prefix and completion are at most
  // 220 tokens.
  config.max_kv_tokens = random.Chance(50) ? std::max<int64_t>(224, 2 * config.page_size) + random.Pick(0, 100) : 4000;
  if (random.Chance(60)) config.disturb_seed = static_cast<uint64_t>(random.Pick(0, 1 << 30));
  return config;
}

}  // namespace

std::vector<RequestSpec> RandomRequests(const ModelSpec& spec, uint64_t seed) {
  Random random(seed), lists(seed + 77);
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
    if (lists.Chance(40)) {
      for (int64_t t = lists.Pick(20, spec.vocab_size); t > 0; --t) {
        s.allowed_token_ids.push_back(static_cast<int32_t>(lists.Pick(0, spec.vocab_size - 1)));
      }
    }
    if (lists.Chance(40)) {
      for (int64_t t = lists.Pick(1, spec.vocab_size / 2); t > 0; --t) {
        s.logit_bias[static_cast<int32_t>(lists.Pick(0, spec.vocab_size - 1))] =
            0.5f * static_cast<float>(lists.Pick(-8, 8));
      }
    }
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

bool SameScores(const RowLogprobs& a, const RowLogprobs& b) {
  return SameBits(a.raw, b.raw) && SameBits(a.temperature, b.temperature) && SameTop(a.top_raw, b.top_raw) &&
         SameTop(a.top_temperature, b.top_temperature);
}

void CheckInvariance(LocalModel& model, LocalModel& other, uint64_t seed, int schedules, Tally& tally) {
  Random random(seed + 1);
  const std::vector<RequestSpec> requests = RandomRequests(model.spec, seed);

  // The reference: every request alone, prompts in one piece.
  std::vector<std::shared_ptr<CollectingSink>> expected;
  for (const RequestSpec& request : requests) {
    auto loop =
        MakeLocalLoop(model, {.page_size = 64, .max_batch_tokens = 4096, .max_sequences = 16, .max_kv_tokens = 4096});
    ASSERT_TRUE(loop.ok()) << loop.status();
    expected.push_back(RunAll(*loop->loop, {request})[0]);
  }

  // Score = Generate.
  for (size_t i = 0; i < requests.size(); ++i) {
    auto loop = MakeLocalLoop(model, RandomLoop(model.ops().kv_page_multiple(), random));
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
    LocalModel& m = random.Chance(30) ? other : model;
    const LoopConfig config = RandomLoop(model.ops().kv_page_multiple(), random);
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

}  // namespace lockstep

// Random rows, parameters and histories against the reference: the kept set, the probabilities, the token drawn. And
// that this comparison rejects each way of getting a rule wrong, and each way of keying the draw wrong.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "sampler/reference.h"
#include "sampler/sampler.h"

namespace lockstep {
namespace {

struct Case {
  std::vector<float> logits;
  SamplingParams params;
  TokenHistory history{{}, true};
  DrawKey key;
};

class CaseMaker {
 public:
  explicit CaseMaker(uint32_t seed) : random_(seed) {}

  Case Make(int64_t max_vocab) {
    Case c;
    const int64_t vocab = 2 + Pick(max_vocab - 1);
    // Half of the rows have many exact ties: multiples of 1/4, which penalties in multiples of 1/8 keep exact.
    const bool ties = Pick(2) == 0;
    std::normal_distribution<float> normal(0, 0.5f + static_cast<float>(Pick(4)));
    c.logits.resize(vocab);
    for (float& x : c.logits) x = ties ? std::round(normal(random_) * 4) / 4 : normal(random_);
    if (Pick(4) == 0) c.logits[Pick(vocab)] = -std::numeric_limits<float>::infinity();
    c.history = MakeHistory(vocab);
    c.params = MakeParams(vocab, c.history);
    c.key = {.seed = random_(),
             .prompt_hash = random_(),
             .sample_index = static_cast<uint32_t>(random_()),
             .position = static_cast<uint32_t>(random_())};
    return c;
  }

 private:
  int64_t Pick(int64_t n) { return static_cast<int64_t>(random_() % n); }
  int32_t Token(int64_t vocab) { return static_cast<int32_t>(Pick(std::min<int64_t>(vocab, 8))); }

  TokenHistory MakeHistory(int64_t vocab) {
    std::vector<int32_t> prompt(Pick(6));
    for (int32_t& t : prompt) t = Token(vocab);
    TokenHistory history(prompt, true);
    for (int64_t i = Pick(6); i > 0; --i) history.Append(Token(vocab));
    return history;
  }

  SamplingParams MakeParams(int64_t vocab, const TokenHistory& history) {
    SamplingParams p;
    const std::vector<float> temperatures = {1.0f, 0.5f, 0.7f, 2.0f, 1.3f};
    p.temperature = temperatures[Pick(5)];
    if (Pick(12) == 0) p.temperature = 0;
    if (Pick(2) == 0) p.top_k = 1 + static_cast<int32_t>(Pick(vocab));
    if (Pick(2) == 0) p.top_p = static_cast<float>(1 + Pick(999)) / 1000;
    if (Pick(3) == 0) p.min_p = static_cast<float>(1 + Pick(300)) / 1000;
    if (Pick(4) == 0) p.repetition_penalty = std::vector<float>{2.0f, 0.5f, 4.0f}[Pick(3)];
    if (Pick(4) == 0) p.frequency_penalty = static_cast<float>(Pick(17) - 8) / 8;
    if (Pick(4) == 0) p.presence_penalty = static_cast<float>(Pick(17) - 8) / 8;
    if (Pick(4) == 0) p.logit_bias = {{Token(vocab), 1.5f}, {Token(vocab), -2.25f}};
    if (Pick(5) == 0) {
      for (int64_t i = 2 + Pick(vocab); i > 0; --i) p.allowed_token_ids.push_back(static_cast<int32_t>(Pick(vocab)));
    }
    if (Pick(4) == 0) {
      for (int64_t i = 1 + Pick(3); i > 0; --i) {
        std::vector<int32_t> words(1 + Pick(3));
        for (int32_t& t : words) t = Token(vocab);
        p.bad_words.push_back(words);
      }
      // One that follows from what is there.
      const auto tokens = history.tokens();
      if (tokens.size() >= 2) p.bad_words.push_back({tokens[tokens.size() - 2], tokens.back(), Token(vocab)});
    }
    if (Pick(3) == 0) {
      p.min_tokens = Pick(7);
      p.eos_token_ids = {Token(vocab)};
      p.stop_token_ids = {Token(vocab)};
    }
    return p;
  }

  std::mt19937 random_;
};

enum class Verdict { kAgree, kDiffer, kTooClose };

// Rounding: the sampler's logits are fp32 (penalty, bias, division: half an ulp each, of at most max_abs_logit), its
// weights within an ulp.
double Tolerance(const ReferenceResult& reference) {
  return (reference.max_abs_logit + 1) * 8 * 0x1p-24;
}

Verdict Compare(const Case& c, const ReferenceResult& reference, const SampledToken& sampled) {
  if (reference.margin < 2 * Tolerance(reference)) return Verdict::kTooClose;
  std::vector<int32_t> kept;
  for (size_t i = 0; i < reference.probabilities.size(); ++i) {
    if (reference.probabilities[i] > 0) kept.push_back(static_cast<int32_t>(i));
  }
  if (kept != sampled.logprobs.kept_token_ids) return Verdict::kDiffer;
  if (reference.probabilities[sampled.token] == 0) return Verdict::kDiffer;
  const double expected = std::log(reference.probabilities[sampled.token]);
  if (!(std::abs(expected - sampled.logprobs.processed) <= Tolerance(reference))) return Verdict::kDiffer;
  double clearance = 0;
  const int32_t drawn = ReferenceDraw(reference.probabilities, UniformDraw(c.key), &clearance);
  if (c.params.temperature > 0 && clearance > Tolerance(reference) && drawn != sampled.token) return Verdict::kDiffer;
  return Verdict::kAgree;
}

constexpr LogprobOptions kOptions{.processed = true, .kept_token_ids = true};

// The error's case: nothing left to draw from.
bool Impossible(const Case& c) {
  SamplerScratch scratch;
  return !SampleRow(c.logits, c.params, {}, c.history, c.key, scratch).ok();
}

bool AllMasked(const ReferenceResult& reference) {
  return std::none_of(reference.probabilities.begin(), reference.probabilities.end(), [](double p) { return p > 0; });
}

TEST(SamplerPropertyTest, AgreesWithTheReference) {
  CaseMaker maker(1);
  SamplerScratch scratch;
  int too_close = 0;
  int impossible = 0;
  constexpr int kCases = 20000;
  for (int i = 0; i < kCases; ++i) {
    const Case c = maker.Make(i % 100 == 0 ? 4000 : 60);
    ASSERT_TRUE(ValidateSamplingParams(c.params, static_cast<int64_t>(c.logits.size())).ok());
    const auto sampled = SampleRow(c.logits, c.params, kOptions, c.history, c.key, scratch);
    if (!sampled.ok()) {
      ASSERT_EQ(sampled.status().code(), absl::StatusCode::kFailedPrecondition) << sampled.status();
      ++impossible;
      continue;
    }
    const Verdict verdict = Compare(c, ReferenceDistribution(c.logits, c.params, c.history), *sampled);
    ASSERT_NE(verdict, Verdict::kDiffer) << "case " << i;
    too_close += verdict == Verdict::kTooClose ? 1 : 0;
  }
  EXPECT_LT(too_close, kCases / 100);
  EXPECT_LT(impossible, kCases / 50);
}

TEST(SamplerPropertyTest, AgreesWithTheReferenceOnFullVocabularies) {
  std::mt19937 random(2);
  SamplerScratch scratch;
  int compared = 0;
  for (int i = 0; i < 12; ++i) {
    Case c;
    c.logits.resize(i % 2 == 0 ? 100352 : 262144);
    std::normal_distribution<float> normal(0, 1.0f + static_cast<float>(i % 4));
    for (float& x : c.logits) x = i % 3 == 0 ? std::round(normal(random) * 4) / 4 : normal(random);
    c.params.top_p = std::vector<float>{0.95f, 0.5f, 1.0f, 0.999f}[i % 4];
    c.params.top_k = i % 5 == 1 ? 50 : i % 5 == 2 ? 30000 : 0;
    c.params.min_p = i % 5 == 3 ? 0.01f : 0.0f;
    c.key.position = i;
    const auto sampled = SampleRow(c.logits, c.params, kOptions, c.history, c.key, scratch);
    ASSERT_TRUE(sampled.ok());
    ReferenceResult reference = ReferenceDistribution(c.logits, c.params, c.history);
    // With a hundred thousand tokens some boundary is always near; of top_p's, sums of that many weights are still
    // exact to this.
    if (reference.margin < 1e-6) continue;
    reference.margin = 1;
    EXPECT_EQ(Compare(c, reference, *sampled), Verdict::kAgree) << i;
    ++compared;
  }
  EXPECT_GE(compared, 6);
}

struct NamedMutation {
  Mutation mutation;
  std::string name;
};

TEST(SamplerPropertyTest, RejectsEveryMutation) {
  const std::vector<NamedMutation> mutations = {
      {Mutation::kTopKOneMore, "top_k one more"},
      {Mutation::kTopKOneLess, "top_k one less"},
      {Mutation::kTopPExcludesCrossing, "top_p excludes the crossing token"},
      {Mutation::kTopPOneMore, "top_p one more"},
      {Mutation::kTopPOverFullVocabulary, "top_p not renormalised after top_k"},
      {Mutation::kMinPUnnormalised, "min_p unnormalised"},
      {Mutation::kMinPOfSecond, "min_p of the second"},
      {Mutation::kTiesToHighestId, "ties to the highest id"},
      {Mutation::kTiesAllKept, "ties all kept"},
      {Mutation::kTopPBeforeTopK, "top_p before top_k"},
      {Mutation::kTemperatureAfterFilters, "temperature after the filters"},
      {Mutation::kTemperatureMultiplies, "temperature multiplies"},
      {Mutation::kTemperatureIgnored, "temperature ignored"},
      {Mutation::kRepetitionInverted, "repetition inverted"},
      {Mutation::kRepetitionAlwaysDivides, "repetition always divides"},
      {Mutation::kRepetitionIgnoresPrompt, "repetition ignores the prompt"},
      {Mutation::kRepetitionIgnoresGenerated, "repetition ignores the generated"},
      {Mutation::kFrequencyAdds, "frequency adds"},
      {Mutation::kFrequencyIgnoresCount, "frequency ignores the count"},
      {Mutation::kPresenceAdds, "presence adds"},
      {Mutation::kPresenceCountsPrompt, "presence counts the prompt"},
      {Mutation::kBiasSubtracts, "bias subtracts"},
      {Mutation::kBiasAfterTemperature, "bias after the temperature"},
      {Mutation::kBiasBeforeRepetition, "bias before repetition"},
      {Mutation::kAllowedInverted, "allowed inverted"},
      {Mutation::kBadWordsIgnorePrefix, "bad_words ignore their prefix"},
      {Mutation::kBadWordsGeneratedOnly, "bad_words look at generated tokens only"},
      {Mutation::kBadWordsIgnored, "bad_words ignored"},
      {Mutation::kMinTokensOneLess, "min_tokens one less"},
      {Mutation::kMinTokensOneMore, "min_tokens one more"},
      {Mutation::kMinTokensEosOnly, "min_tokens for eos only"},
      {Mutation::kPenaltiesAfterTemperature, "penalties after the temperature"},
  };
  for (const NamedMutation& mutation : mutations) {
    CaseMaker maker(3);
    SamplerScratch scratch;
    int differ = 0;
    for (int i = 0; i < 3000; ++i) {
      const Case c = maker.Make(40);
      if (Impossible(c)) continue;
      const auto sampled = SampleRow(c.logits, c.params, kOptions, c.history, c.key, scratch);
      const ReferenceResult mutant = ReferenceDistribution(c.logits, c.params, c.history, mutation.mutation);
      if (AllMasked(mutant) || Compare(c, mutant, *sampled) == Verdict::kDiffer) ++differ;
    }
    // Even the rarest rule is hit often enough not to hang on one lucky case.
    EXPECT_GE(differ, 5) << mutation.name;
  }
}

// Same tokens as the reference draws from the same key; other keys give other tokens.
TEST(SamplerPropertyTest, DrawsFollowTheKeyExactly) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> logits(50);
  for (float& x : logits) x = normal(random);
  const TokenHistory history({}, false);
  const std::vector<double> probabilities = ReferenceDistribution(logits, {}, history).probabilities;
  struct Keying {
    std::string name;
    DrawKey (*change)(DrawKey);
  };
  const std::vector<Keying> wrong = {
      {"next position", [](DrawKey k) { return ++k.position, k; }},
      {"previous position", [](DrawKey k) { return --k.position, k; }},
      {"seed ignored", [](DrawKey k) { return k.seed = 0, k; }},
      {"only half of the seed", [](DrawKey k) { return k.seed &= 0xFFFFFFFF, k; }},
      {"prompt ignored", [](DrawKey k) { return k.prompt_hash = 0, k; }},
      {"sample index ignored", [](DrawKey k) { return k.sample_index = 0, k; }},
      {"sample index and position swapped", [](DrawKey k) { return std::swap(k.sample_index, k.position), k; }},
  };
  SamplerScratch scratch;
  constexpr int kDraws = 20000;
  std::map<std::string, int> mismatches;
  int skipped = 0;
  for (int i = 0; i < kDraws; ++i) {
    const DrawKey key{.seed = uint64_t{random()} << 32 | random(),
                      .prompt_hash = random(),
                      .sample_index = 1 + static_cast<uint32_t>(random() % 64),
                      .position = 100 + static_cast<uint32_t>(random() % 4096)};
    const int32_t token = SampleRow(logits, {}, {}, history, key, scratch)->token;
    double clearance = 0;
    const int32_t expected = ReferenceDraw(probabilities, UniformDraw(key), &clearance);
    if (clearance < 1e-6) {
      ++skipped;
      continue;
    }
    ASSERT_EQ(token, expected) << i;
    for (const Keying& keying : wrong) {
      mismatches[keying.name] += ReferenceDraw(probabilities, UniformDraw(keying.change(key)), &clearance) != token;
    }
  }
  EXPECT_LT(skipped, 20);
  // Independent draws differ with probability 1 - sum p^2, here above 0.9.
  for (const Keying& keying : wrong) EXPECT_GT(mismatches[keying.name], kDraws / 2) << keying.name;
}

TEST(SamplerPropertyTest, ProcessedSumsToOne) {
  CaseMaker maker(6);
  SamplerScratch scratch;
  for (int i = 0; i < 500; ++i) {
    const Case c = maker.Make(60);
    if (Impossible(c)) continue;
    double sum = 0;
    double unfiltered = 0;
    for (size_t t = 0; t < c.logits.size(); ++t) {
      const auto scored = ScoreRow(c.logits, static_cast<int32_t>(t), c.params,
                                   {.temperature = true, .processed = true}, c.history, scratch);
      sum += std::exp(static_cast<double>(scored->processed));
      unfiltered += std::exp(static_cast<double>(scored->temperature));
    }
    EXPECT_NEAR(sum, 1, 1e-5);
    EXPECT_NEAR(unfiltered, 1, 1e-5);
  }
}

}  // namespace
}  // namespace lockstep

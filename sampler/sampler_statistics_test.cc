// Chi-square tests of what is drawn against the exact distribution, for every filter and for combinations.
//
// Level: each test rejects a correct sampler with probability 1e-6, the whole file (20 scenarios) with 2e-5; draws are
// seeded, so a pass is a pass for good. Power: every mutation of a scenario is rejected by the same draws at the same
// level, with a probability computed beforehand of at least 1 - 1e-6.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "sampler/chi_square.h"
#include "sampler/reference.h"
#include "sampler/sampler.h"

namespace lockstep {
namespace {

constexpr int64_t kDraws = 200000;
constexpr double kLevel = 1e-6;
constexpr double kPower = 1 - 1e-6;
constexpr int kVocab = 40;

struct Scenario {
  std::string name;
  SamplingParams params;
  std::vector<Mutation> mutants;
  bool ties = false;  // logits in steps of 1/2
};

void PrintTo(const Scenario& scenario, std::ostream* out) {
  *out << scenario.name;
}

std::vector<float> Logits(bool ties) {
  std::mt19937 random(17);
  std::normal_distribution<float> normal(0, 1.2f);
  std::vector<float> logits(kVocab);
  for (float& x : logits) x = ties ? std::round(normal(random) * 2) / 2 : normal(random);
  if (!ties) logits[4] = 1.25f;  // generated, not in the prompt: probable enough for its penalties to be seen
  return logits;
}

// Tokens 0 to 3 in the prompt, 2 to 5 generated, 5 three times.
TokenHistory MakeHistory() {
  TokenHistory history(std::vector<int32_t>{0, 1, 2, 3}, true);
  for (const int32_t token : {2, 3, 4, 5, 5, 5}) history.Append(token);
  return history;
}

std::vector<Scenario> Scenarios() {
  std::vector<Scenario> s;
  const auto add = [&](const std::string& name, std::vector<Mutation> mutants, bool ties = false) -> SamplingParams& {
    s.push_back({.name = name, .params = {}, .mutants = std::move(mutants), .ties = ties});
    return s.back().params;
  };
  using enum Mutation;
  add("plain", {});
  add("cold", {kTemperatureMultiplies, kTemperatureIgnored}).temperature = 0.6f;
  add("hot", {kTemperatureMultiplies, kTemperatureIgnored}).temperature = 1.8f;
  add("top_k", {kTopKOneMore, kTopKOneLess}).top_k = 7;
  add("top_k with ties", {kTopKOneMore, kTopKOneLess, kTiesToHighestId, kTiesAllKept}, true).top_k = 10;
  add("top_p", {kTopPExcludesCrossing, kTopPOneMore}).top_p = 0.8f;
  add("small top_p", {kTopPOneMore}).top_p = 0.01f;
  add("top_p with ties", {kTopPExcludesCrossing, kTopPOneMore, kTiesToHighestId}, true).top_p = 0.7f;
  add("min_p", {kMinPUnnormalised, kMinPOfSecond}).min_p = 0.2f;
  add("repetition penalty",
      {kRepetitionInverted, kRepetitionAlwaysDivides, kRepetitionIgnoresPrompt, kRepetitionIgnoresGenerated})
      .repetition_penalty = 1.7f;
  add("frequency penalty", {kFrequencyAdds, kFrequencyIgnoresCount}).frequency_penalty = 0.4f;
  add("presence penalty", {kPresenceAdds, kPresenceCountsPrompt}).presence_penalty = 0.6f;
  add("logit_bias", {kBiasSubtracts}).logit_bias = {{7, 1.0f}, {8, -1.0f}};
  add("allowed_token_ids", {kAllowedInverted}).allowed_token_ids = {1, 4, 9, 16, 25, 36};
  add("bad_words", {kBadWordsIgnored, kBadWordsIgnorePrefix}).bad_words = {{11}, {5, 5, 12}, {4, 5, 13}};
  {
    SamplingParams& p = add("min_tokens", {kMinTokensOneLess, kMinTokensEosOnly});
    p.min_tokens = 7;
    p.eos_token_ids = {20};
    p.stop_token_ids = {21};
  }
  {
    SamplingParams& p = add("min_tokens reached", {kMinTokensOneMore});
    p.min_tokens = 6;
    p.eos_token_ids = {20};
    p.stop_token_ids = {21};
  }
  {
    SamplingParams& p =
        add("temperature, top_k, top_p", {kTemperatureAfterFilters, kTopPBeforeTopK, kTopPOverFullVocabulary,
                                          kTopPExcludesCrossing, kTopPOneMore, kTopKOneLess});
    p.temperature = 1.5f;
    p.top_k = 13;
    p.top_p = 0.85f;
  }
  {
    SamplingParams& p = add("temperature, min_p", {kTemperatureAfterFilters, kMinPUnnormalised, kMinPOfSecond});
    p.temperature = 0.7f;
    p.min_p = 0.1f;
  }
  {
    SamplingParams& p =
        add("everything", {kTemperatureAfterFilters, kTopPExcludesCrossing, kTopPOneMore, kRepetitionInverted,
                           kFrequencyAdds, kPresenceAdds, kBiasSubtracts, kBiasAfterTemperature, kBiasBeforeRepetition,
                           kPenaltiesAfterTemperature, kBadWordsIgnored});
    p.temperature = 1.4f;
    p.top_k = 25;
    p.top_p = 0.92f;
    p.min_p = 0.02f;
    p.repetition_penalty = 1.5f;
    p.frequency_penalty = -0.3f;
    p.presence_penalty = -0.7f;
    p.logit_bias = {{5, 1.0f}, {6, 2.0f}};
    p.bad_words = {{16}, {5, 5, 17}};
  }
  return s;
}

class ChiSquareTest : public testing::TestWithParam<Scenario> {};

TEST_P(ChiSquareTest, AcceptsTheExactDistributionAndRejectsMutants) {
  const Scenario& scenario = GetParam();
  const std::vector<float> logits = Logits(scenario.ties);
  const TokenHistory history = MakeHistory();
  ASSERT_TRUE(ValidateSamplingParams(scenario.params, kVocab).ok());
  SamplerScratch scratch;
  std::vector<int64_t> counts(kVocab, 0);
  for (int64_t i = 0; i < kDraws; ++i) {
    const DrawKey key{.seed = 99, .prompt_hash = 1, .sample_index = 0, .position = static_cast<uint32_t>(i)};
    const auto sampled = SampleRow(logits, scenario.params, {}, history, key, scratch);
    ASSERT_TRUE(sampled.ok()) << sampled.status();
    ++counts[sampled->token];
  }
  const std::vector<double> exact = ReferenceDistribution(logits, scenario.params, history).probabilities;
  EXPECT_GT(ChiSquarePValue(counts, exact), kLevel);
  for (const Mutation mutation : scenario.mutants) {
    const std::vector<double> mutant = ReferenceDistribution(logits, scenario.params, history, mutation).probabilities;
    EXPECT_GT(ChiSquarePower(exact, mutant, kDraws, kLevel), kPower) << "mutation " << static_cast<int>(mutation);
    EXPECT_LT(ChiSquarePValue(counts, mutant), kLevel) << "mutation " << static_cast<int>(mutation);
  }
}

std::string NameOf(const testing::TestParamInfo<Scenario>& info) {
  std::string name;
  for (const char c : info.param.name) {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) name += c;
    if (c == ' ') name += '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Scenarios, ChiSquareTest, testing::ValuesIn(Scenarios()), NameOf);

// The draw itself, broken: against the plain distribution.
TEST(ChiSquareOfDrawTest, RejectsABrokenInverseCdf) {
  const std::vector<float> logits = Logits(false);
  const std::vector<double> exact = ReferenceDistribution(logits, {}, MakeHistory()).probabilities;
  const auto p_value = [&](auto uniform) {
    std::vector<int64_t> counts(kVocab, 0);
    double clearance = 0;
    for (int64_t i = 0; i < kDraws; ++i) ++counts[ReferenceDraw(exact, uniform(static_cast<uint32_t>(i)), &clearance)];
    return ChiSquarePValue(counts, exact);
  };
  const auto draw = [](uint32_t i) { return UniformDraw({.seed = 99, .prompt_hash = 1, .position = i}); };
  EXPECT_GT(p_value(draw), kLevel);
  EXPECT_LT(p_value([&](uint32_t i) { return draw(i) * draw(i + 1); }), kLevel);
  EXPECT_LT(p_value([&](uint32_t i) { return std::max(draw(i), 0.02); }), kLevel);
  EXPECT_LT(p_value([&](uint32_t i) { return std::floor(draw(i) * 64) / 64; }), kLevel);
  EXPECT_LT(p_value([&](uint32_t) { return draw(0); }), kLevel);
}

TEST(ChiSquareTailTest, KnownValues) {
  // Tables of the chi-square distribution.
  EXPECT_NEAR(ChiSquareTail(3.841, 1), 0.05, 1e-4);
  EXPECT_NEAR(ChiSquareTail(18.307, 10), 0.05, 1e-4);
  EXPECT_NEAR(ChiSquareTail(135.807, 100), 0.01, 1e-4);
  EXPECT_NEAR(ChiSquareTail(23.928, 1), 1e-6, 1e-8);
  // Two degrees of freedom: e^(-x/2).
  for (const double x : {0.5, 3.0, 20.0, 80.0}) EXPECT_NEAR(ChiSquareTail(x, 2) / std::exp(-x / 2), 1, 1e-9);
}

// The test's own level, on a coarser scale: p-values of correct draws are uniform.
TEST(ChiSquareTailTest, PValuesOfFairDrawsAreUniform) {
  const std::vector<double> uniform(20, 0.05);
  std::vector<int64_t> deciles(10, 0);
  for (uint32_t run = 0; run < 2000; ++run) {
    std::vector<int64_t> counts(20, 0);
    for (uint32_t i = 0; i < 1000; ++i) ++counts[static_cast<size_t>(UniformDraw({.seed = run, .position = i}) * 20)];
    ++deciles[std::min<size_t>(static_cast<size_t>(ChiSquarePValue(counts, uniform) * 10), 9)];
  }
  EXPECT_GT(ChiSquarePValue(deciles, std::vector<double>(10, 0.1)), kLevel);
}

}  // namespace
}  // namespace lockstep

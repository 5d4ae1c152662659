// Each rule of sampler/README.md by a small example, the edges, and the errors.
#include "sampler/sampler.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "sampler/reference.h"
#include "sampler/row_ops.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TokenHistory NoHistory() {
  return TokenHistory({}, false);
}

TokenHistory History(const std::vector<int32_t>& prompt, const std::vector<int32_t>& generated) {
  TokenHistory history(prompt, true);
  for (const int32_t token : generated) history.Append(token);
  return history;
}

std::vector<int32_t> Kept(const std::vector<float>& logits, const SamplingParams& params,
                          const TokenHistory& history = NoHistory()) {
  SamplerScratch scratch;
  const auto sampled = SampleRow(logits, params, {.kept_token_ids = true}, history, {}, scratch);
  EXPECT_TRUE(sampled.ok()) << sampled.status();
  return sampled.ok() ? sampled->logprobs.kept_token_ids : std::vector<int32_t>{};
}

// ln of the probability that `token` is drawn with.
float Processed(const std::vector<float>& logits, int32_t token, const SamplingParams& params,
                const TokenHistory& history = NoHistory()) {
  SamplerScratch scratch;
  const auto scored = ScoreRow(logits, token, params, {.processed = true}, history, scratch);
  EXPECT_TRUE(scored.ok()) << scored.status();
  return scored.ok() ? scored->processed : kNan;
}

absl::Status Error(const std::vector<float>& logits, const SamplingParams& params,
                   const TokenHistory& history = NoHistory()) {
  SamplerScratch scratch;
  return SampleRow(logits, params, {}, history, {}, scratch).status();
}

// Logits with these probabilities.
std::vector<float> LogitsOf(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

TEST(TokenHistoryTest, CountsEachTokenOnce) {
  TokenHistory history = History({5, 3, 5}, {3, 9, 9});
  EXPECT_EQ(history.prompt_length(), 3);
  EXPECT_EQ(history.generated(), 3);
  EXPECT_THAT(history.tokens(), ElementsAre(5, 3, 5, 3, 9, 9));
  std::vector<std::tuple<int, int, bool>> counts;
  for (const auto& c : history.counts()) counts.emplace_back(c.token, c.generated, c.in_prompt);
  EXPECT_THAT(counts,
              testing::UnorderedElementsAre(std::tuple(3, 1, true), std::tuple(5, 0, true), std::tuple(9, 2, false)));
  TokenHistory without({std::vector<int32_t>{1, 2}}, false);
  without.Append(3);
  EXPECT_TRUE(without.counts().empty());
  EXPECT_EQ(without.generated(), 1);
}

TEST(GreedyTest, LowestIdOfTheLargest) {
  SamplingParams params;
  params.temperature = 0;
  params.top_k = 2;
  params.top_p = 0.1f;
  params.min_p = 0.5f;
  EXPECT_THAT(Kept({1, 3, 2, 3, 3}, params), ElementsAre(1));
  EXPECT_THAT(Kept({-0.0f, 0.0f}, params), ElementsAre(0));
  EXPECT_THAT(Kept({0.0f, -0.0f}, params), ElementsAre(0));
  EXPECT_EQ(Processed({1, 3, 2}, 1, params), 0.0f);
  EXPECT_EQ(Processed({1, 3, 2}, 0, params), -kInf);
  params.logit_bias = {{2, 1.5f}};
  EXPECT_THAT(Kept({1, 3, 2}, params), ElementsAre(2));
  params.bad_words = {{2}};
  EXPECT_THAT(Kept({1, 3, 2}, params), ElementsAre(1));
}

TEST(GreedyTest, SeedAndPositionDoNotMatter) {
  SamplingParams params;
  params.temperature = 0;
  SamplerScratch scratch;
  for (uint32_t i = 0; i < 100; ++i) {
    EXPECT_EQ(
        SampleRow(std::vector<float>{1, 2, 1.9f}, params, {}, NoHistory(), {.seed = i, .position = i}, scratch)->token,
        1);
  }
}

TEST(TopKTest, TiesAtTheKthGoToTheLowestIds) {
  SamplingParams params;
  params.top_k = 3;
  EXPECT_THAT(Kept({1, 2, 1, 3, 1, 1}, params), ElementsAre(0, 1, 3));
  params.top_k = 4;
  EXPECT_THAT(Kept({1, 2, 1, 3, 1, 1}, params), ElementsAre(0, 1, 2, 3));
  params.top_k = 1;
  EXPECT_THAT(Kept({2, 2, 2}, params), ElementsAre(0));
  params.top_k = 2;
  EXPECT_THAT(Kept({-1, -0.0f, 0.0f, 0.0f}, params), ElementsAre(1, 2));
  params.top_k = 6;
  EXPECT_THAT(Kept({1, 2, 1, 3, 1, 1}, params), ElementsAre(0, 1, 2, 3, 4, 5));
  params.top_k = 0;
  EXPECT_EQ(Kept({1, 2, 1, 3, 1, 1}, params).size(), 6u);
  params.top_k = 1000;
  EXPECT_EQ(Kept({1, 2, 1, 3, 1, 1}, params).size(), 6u);
}

TEST(TopKTest, CountsOnlyWhatMasksLeave) {
  SamplingParams params;
  params.top_k = 2;
  params.bad_words = {{3}};
  EXPECT_THAT(Kept({1, 2, 1, 3, -kInf}, params), ElementsAre(0, 1));
  params.top_k = 4;
  EXPECT_THAT(Kept({1, 2, 1, 3, -kInf}, params), ElementsAre(0, 1, 2));
}

TEST(TopPTest, KeepsTheTokenThatCrosses) {
  SamplingParams params;
  const std::vector<float> logits = LogitsOf({0.1, 0.4, 0.2, 0.3});
  params.top_p = 0.39f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(1));
  params.top_p = 0.41f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(1, 3));
  params.top_p = 0.71f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(1, 2, 3));
  params.top_p = 0.91f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(0, 1, 2, 3));
  params.top_p = std::numeric_limits<float>::denorm_min();
  EXPECT_THAT(Kept(logits, params), ElementsAre(1));
}

TEST(TopPTest, ReachingExactlyIsEnough) {
  SamplingParams params;
  const std::vector<float> even(8, 1.25f);
  for (int k = 1; k <= 8; ++k) {
    params.top_p = static_cast<float>(k) / 8;
    EXPECT_EQ(Kept(even, params).size(), k);
    params.top_p = std::nextafter(static_cast<float>(k) / 8, 0.0f);
    EXPECT_EQ(Kept(even, params).size(), k);
    if (k == 8) continue;
    params.top_p = std::nextafter(static_cast<float>(k) / 8, 1.0f);
    EXPECT_EQ(Kept(even, params).size(), k + 1);
  }
  params.top_p = 0.375f;
  EXPECT_THAT(Kept(even, params), ElementsAre(0, 1, 2));
}

TEST(TopPTest, IsTakenOfWhatTopKLeaves) {
  SamplingParams params;
  const std::vector<float> logits = LogitsOf({0.4, 0.3, 0.2, 0.1});
  params.top_p = 0.55f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(0, 1));
  params.top_k = 2;  // 4/7 = 0.571
  EXPECT_THAT(Kept(logits, params), ElementsAre(0));
}

TEST(MinPTest, IsRelativeToTheLargest) {
  SamplingParams params;
  const std::vector<float> logits = {0, 1, -1, -2};  // relative to the largest: e^-1, 1, e^-2, e^-3
  params.min_p = 0.1f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(0, 1, 2));
  params.min_p = 0.14f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(0, 1));
  params.min_p = 0.4f;
  EXPECT_THAT(Kept(logits, params), ElementsAre(1));
  params.min_p = 0x1.fffffep-1f;
  EXPECT_THAT(Kept({1, 1, 0.5f}, params), ElementsAre(0, 1));
}

TEST(MinPTest, KeepsAWeightThatIsExactlyMinP) {
  const std::vector<float> logits = {0, -1};
  std::vector<float> weights(2);
  uint64_t mass = 0;
  WeighRow(logits, 0, weights.data(), &mass);
  SamplingParams params;
  params.min_p = weights[1];
  EXPECT_THAT(Kept(logits, params), ElementsAre(0, 1));
  params.min_p = std::nextafter(weights[1], 1.0f);
  EXPECT_THAT(Kept(logits, params), ElementsAre(0));
}

TEST(MinPTest, SeesTheTemperature) {
  SamplingParams params;
  params.min_p = 0.2f;
  EXPECT_THAT(Kept({0, 2}, params), ElementsAre(1));
  params.temperature = 2;
  EXPECT_THAT(Kept({0, 2}, params), ElementsAre(0, 1));
}

TEST(TemperatureTest, Divides) {
  SamplingParams params;
  params.temperature = 0.5f;
  EXPECT_NEAR(Processed({0, 1}, 0, params), -2 - std::log1p(std::exp(-2.0)), 1e-6);
  params.temperature = 2;
  EXPECT_NEAR(Processed({0, 1}, 0, params), -0.5 - std::log1p(std::exp(-0.5)), 1e-6);
  params.temperature = kMinTemperature;
  EXPECT_EQ(Processed({0, 1}, 1, params), 0.0f);
  params.temperature = kMaxTemperature;
  EXPECT_NEAR(Processed({0, 1}, 1, params), std::log(0.5), 1e-4);
}

// Two-token rows: the difference of log-probabilities is the difference of logits.
float Difference(const std::vector<float>& logits, const SamplingParams& params, const TokenHistory& history) {
  return Processed(logits, 0, params, history) - Processed(logits, 1, params, history);
}

TEST(PenaltyTest, RepetitionDividesPositiveAndMultipliesNegative) {
  SamplingParams params;
  params.repetition_penalty = 2;
  EXPECT_NEAR(Difference({3, 0.5f}, params, History({0}, {})), 1.5 - 0.5, 1e-6);
  EXPECT_NEAR(Difference({3, 0.5f}, params, History({}, {0, 0, 0})), 1.5 - 0.5, 1e-6);
  EXPECT_NEAR(Difference({-3, 0.5f}, params, History({0}, {0})), -6 - 0.5, 1e-6);
  EXPECT_NEAR(Difference({3, 0.5f}, params, History({0, 1}, {})), 1.5 - 0.25, 1e-6);
  EXPECT_NEAR(Difference({0, 0.5f}, params, History({0}, {})), -0.5, 1e-6);
}

TEST(PenaltyTest, FrequencyAndPresenceCountGeneratedTokens) {
  SamplingParams params;
  params.frequency_penalty = 0.25f;
  EXPECT_NEAR(Difference({3, 3}, params, History({0, 0}, {})), 0, 1e-6);
  EXPECT_NEAR(Difference({3, 3}, params, History({0}, {0, 0, 0})), -0.75, 1e-6);
  params.frequency_penalty = 0;
  params.presence_penalty = 0.5f;
  EXPECT_NEAR(Difference({3, 3}, params, History({0, 0}, {})), 0, 1e-6);
  EXPECT_NEAR(Difference({3, 3}, params, History({0}, {0, 0, 0})), -0.5, 1e-6);
  params.presence_penalty = -0.5f;
  EXPECT_NEAR(Difference({3, 3}, params, History({}, {0})), 0.5, 1e-6);
}

TEST(PenaltyTest, OrderIsRepetitionThenOthersThenBiasThenTemperature) {
  SamplingParams params;
  params.repetition_penalty = 2;
  params.frequency_penalty = 0.5f;
  params.presence_penalty = 0.25f;
  params.logit_bias = {{0, 3.0f}};
  params.temperature = 0.5f;
  // ((4 / 2 - 0.5 * 2 - 0.25) + 3) / 0.5 against 1 / 0.5.
  EXPECT_NEAR(Difference({4, 1}, params, History({}, {0, 0})), 7.5 - 2, 1e-5);
}

TEST(MaskTest, AllowedTokens) {
  SamplingParams params;
  params.allowed_token_ids = {4, 1, 4};
  EXPECT_THAT(Kept({9, 1, 9, 9, 2}, params), ElementsAre(1, 4));
  EXPECT_EQ(Processed({9, 1, 9, 9, 2}, 0, params), -kInf);
}

TEST(MaskTest, BadWordsWaitForTheirPrefix) {
  SamplingParams params;
  params.bad_words = {{1, 2}, {3}, {0, 0, 4}};
  const std::vector<float> logits(5, 0.0f);
  EXPECT_THAT(Kept(logits, params, History({}, {})), ElementsAre(0, 1, 2, 4));
  EXPECT_THAT(Kept(logits, params, History({1}, {})), ElementsAre(0, 1, 4));
  EXPECT_THAT(Kept(logits, params, History({2}, {1})), ElementsAre(0, 1, 4));
  EXPECT_THAT(Kept(logits, params, History({1}, {4})), ElementsAre(0, 1, 2, 4));
  // The prefix may begin in the prompt and end in what was generated.
  EXPECT_THAT(Kept(logits, params, History({0}, {0})), ElementsAre(0, 1, 2));
  EXPECT_THAT(Kept(logits, params, History({0}, {})), ElementsAre(0, 1, 2, 4));
}

TEST(MaskTest, MinTokensMasksStopsUntilThatManyAreGenerated) {
  SamplingParams params;
  params.min_tokens = 2;
  params.eos_token_ids = {0};
  params.stop_token_ids = {2};
  const std::vector<float> logits(4, 0.0f);
  EXPECT_THAT(Kept(logits, params, History({1, 1, 1}, {})), ElementsAre(1, 3));
  EXPECT_THAT(Kept(logits, params, History({}, {1})), ElementsAre(1, 3));
  EXPECT_THAT(Kept(logits, params, History({}, {1, 1})), ElementsAre(0, 1, 2, 3));
}

TEST(MaskTest, BiasDoesNotUnmask) {
  SamplingParams params;
  params.bad_words = {{0}};
  params.logit_bias = {{0, 100.0f}, {2, 100.0f}};
  EXPECT_THAT(Kept({0, 0, -kInf}, params), ElementsAre(1));
}

TEST(LogprobTest, KindsAreTakenBeforeAndAfter) {
  SamplingParams params;
  params.temperature = 0.5f;
  params.top_k = 2;
  params.logit_bias = {{3, 5.0f}};
  const std::vector<float> logits = {0.5f, -1, 2, 1};
  SamplerScratch scratch;
  const auto scored =
      ScoreRow(logits, 2, params, {.raw = true, .temperature = true, .processed = true}, NoHistory(), scratch);
  ASSERT_TRUE(scored.ok());
  EXPECT_FLOAT_EQ(scored->raw, static_cast<float>(ReferenceLogSoftmax(logits, 1)[2]));
  EXPECT_FLOAT_EQ(scored->temperature, static_cast<float>(ReferenceLogSoftmax(logits, 0.5)[2]));
  EXPECT_NEAR(scored->processed, -8 - std::log1p(std::exp(-8.0)), 1e-6);  // 2 / 0.5 against 6 / 0.5
}

TEST(LogprobTest, TemperatureZeroCountsAsOne) {
  SamplingParams params;
  params.temperature = 0;
  SamplerScratch scratch;
  const auto sampled =
      SampleRow(std::vector<float>{1, 2, 3}, params, {.raw = true, .temperature = true, .processed = true, .top_k = 2},
                NoHistory(), {}, scratch);
  ASSERT_TRUE(sampled.ok());
  EXPECT_EQ(sampled->token, 2);
  EXPECT_EQ(std::bit_cast<uint32_t>(sampled->logprobs.raw), std::bit_cast<uint32_t>(sampled->logprobs.temperature));
  EXPECT_EQ(sampled->logprobs.processed, 0.0f);
  ASSERT_EQ(sampled->logprobs.top_processed.size(), 1u);
  EXPECT_EQ(sampled->logprobs.top_processed[0].token, 2);
  EXPECT_EQ(sampled->logprobs.top_raw.size(), 2u);
}

TEST(LogprobTest, NearCertaintyKeepsItsPrecision) {
  SamplerScratch scratch;
  const auto scored = ScoreRow(std::vector<float>{20, 0}, 0, {}, {.raw = true}, NoHistory(), scratch);
  EXPECT_NEAR(scored->raw, -2.0611536e-9, 1e-13);
  EXPECT_EQ(ScoreRow(std::vector<float>{-kInf, 0}, 0, {}, {.raw = true}, NoHistory(), scratch)->raw, -kInf);
  EXPECT_EQ(ScoreRow(std::vector<float>{-kInf, 0}, 1, {}, {.raw = true}, NoHistory(), scratch)->raw, 0.0f);
}

TEST(LogprobTest, TopListsDescendWithTiesByLowestId) {
  SamplingParams params;
  params.top_k = 3;
  params.temperature = 0.5f;
  SamplerScratch scratch;
  const auto sampled =
      SampleRow(std::vector<float>{1, 2, 1, -kInf, 2, 0}, params,
                {.raw = true, .temperature = true, .processed = true, .top_k = 64}, NoHistory(), {}, scratch);
  ASSERT_TRUE(sampled.ok());
  const auto ids = [](const std::vector<TokenLogprob>& top) {
    std::vector<int32_t> out;
    for (const TokenLogprob& entry : top) out.push_back(entry.token);
    return out;
  };
  EXPECT_THAT(ids(sampled->logprobs.top_raw), ElementsAre(1, 4, 0, 2, 5));
  EXPECT_THAT(ids(sampled->logprobs.top_temperature), ElementsAre(1, 4, 0, 2, 5));
  EXPECT_THAT(ids(sampled->logprobs.top_processed), ElementsAre(1, 4, 0));
  EXPECT_FLOAT_EQ(sampled->logprobs.top_raw[2].logprob,
                  static_cast<float>(ReferenceLogSoftmax(std::vector<float>{1, 2, 1, -kInf, 2, 0}, 1)[0]));
}

TEST(LogprobTest, NothingUnaskedForIsFilledIn) {
  SamplerScratch scratch;
  const auto sampled = SampleRow(std::vector<float>{1, 2}, {}, {}, NoHistory(), {}, scratch);
  EXPECT_EQ(sampled->logprobs.raw, 0);
  EXPECT_EQ(sampled->logprobs.temperature, 0);
  EXPECT_EQ(sampled->logprobs.processed, 0);
  EXPECT_TRUE(sampled->logprobs.top_raw.empty());
  EXPECT_TRUE(sampled->logprobs.kept_token_ids.empty());
}

TEST(ErrorTest, NonFiniteLogitsNameTheToken) {
  std::vector<float> logits(3000, 1.0f);
  logits[2047] = kNan;
  EXPECT_EQ(Error(logits, {}).code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(Error(logits, {}).message()), HasSubstr("token 2047 is nan; want finite or -inf"));
  logits[2047] = kInf;
  SamplingParams greedy;
  greedy.temperature = 0;
  EXPECT_THAT(std::string(Error(logits, greedy).message()), HasSubstr("token 2047 is inf"));
  SamplerScratch scratch;
  EXPECT_EQ(ScoreRow(logits, 0, {}, {.raw = true}, NoHistory(), scratch).status().code(), absl::StatusCode::kInternal);
}

TEST(ErrorTest, OverflowByTemperatureOrBias) {
  SamplingParams params;
  params.temperature = kMinTemperature;
  EXPECT_THAT(std::string(Error({1, 3e38f}, params).message()), HasSubstr("token 1 is inf"));
  EXPECT_EQ(Error({1, 3e38f}, params).code(), absl::StatusCode::kInternal);
  params.logit_bias = {{0, 1.0f}};
  EXPECT_THAT(std::string(Error({1, 3e38f}, params).message()), HasSubstr("token 1 is inf"));
  // Down to -inf is a probability of 0, as it would have been anyway.
  params.logit_bias = {};
  EXPECT_TRUE(Error({1, -3e38f}, params).ok());
}

TEST(ErrorTest, UnderflowByTemperatureLeavesNothing) {
  SamplingParams params;
  params.temperature = kMinTemperature;
  const absl::Status status = Error({-3e38f, -3.2e38f}, params);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("sampling.temperature"));
}

TEST(ErrorTest, NothingLeft) {
  EXPECT_EQ(Error({-kInf, -kInf}, {}).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::string(Error({-kInf, -kInf}, {}).message()), "logits: all 2 are -inf");
  SamplingParams params;
  params.allowed_token_ids = {1, 2};
  params.bad_words = {{1}, {3, 2}};
  params.eos_token_ids = {2};
  params.min_tokens = 5;
  const absl::Status status = Error({0, 0, 0, 0}, params, History({3}, {0}));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::string(status.message()),
            "sampling: no token is left to draw from: allowed_token_ids leaves 2 tokens; bad_words forbids 1 here; "
            "min_tokens masks 1 eos and 0 stop tokens until 5 are generated (1 so far); the remaining logits are -inf");
  params.temperature = 0;
  EXPECT_EQ(Error({0, 0, 0, 0}, params, History({3}, {0})).code(), absl::StatusCode::kFailedPrecondition);
  // The mask matters to draws only.
  SamplerScratch scratch;
  EXPECT_TRUE(ScoreRow(std::vector<float>(4, 0.0f), 0, params, {.raw = true}, History({3}, {0}), scratch).ok());
}

TEST(DrawRowTest, CertainRowsAndSingleTokens) {
  EXPECT_THAT(Kept({-5.0f}, {}), ElementsAre(0));
  SamplerScratch scratch;
  for (uint32_t i = 0; i < 1000; ++i) {
    EXPECT_EQ(SampleRow(std::vector<float>{-kInf, 3, -kInf}, {}, {}, NoHistory(), {.position = i}, scratch)->token, 1);
  }
}

TEST(DrawRowTest, NeverDrawsWhatItDropped) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 2);
  SamplerScratch scratch;
  SamplingParams params;
  params.top_p = 0.7f;
  params.min_p = 0.02f;
  for (uint32_t i = 0; i < 300; ++i) {
    std::vector<float> logits(2500);
    for (float& x : logits) x = normal(random);
    const auto sampled =
        SampleRow(logits, params, {.processed = true, .kept_token_ids = true}, NoHistory(), {.position = i}, scratch);
    ASSERT_TRUE(sampled.ok());
    EXPECT_THAT(sampled->logprobs.kept_token_ids, testing::Contains(sampled->token));
    EXPECT_GT(sampled->logprobs.processed, -kInf);
  }
}

TEST(SampleAndScoreTest, SameBits) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0, 3);
  SamplerScratch scratch;
  SamplerScratch other_scratch;
  for (uint32_t i = 0; i < 200; ++i) {
    std::vector<float> logits(1 + random() % 5000);
    for (float& x : logits) x = normal(random);
    SamplingParams params;
    params.temperature = random() % 3 == 0 ? 1.0f : 0.1f + static_cast<float>(random() % 30) / 10;
    params.top_k = static_cast<int32_t>(random() % 100);
    params.top_p = random() % 2 == 0 ? 1.0f : 0.9f;
    params.min_p = random() % 2 == 0 ? 0.0f : 0.001f;
    params.presence_penalty = random() % 2 == 0 ? 0.0f : 0.3f;
    const TokenHistory history = History({0}, {0, 0});
    const LogprobOptions options{
        .raw = true, .temperature = true, .processed = true, .top_k = 7, .kept_token_ids = true};
    const auto sampled = SampleRow(logits, params, options, history, {.position = i}, scratch);
    ASSERT_TRUE(sampled.ok());
    const auto scored = ScoreRow(logits, sampled->token, params, options, history, other_scratch);
    ASSERT_TRUE(scored.ok());
    // Only some kinds asked for: computed along another path.
    const auto raw = ScoreRow(logits, sampled->token, params, {.raw = true}, history, other_scratch);
    const auto temperature = SampleRow(logits, params, {.temperature = true}, history, {.position = i}, other_scratch);
    const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    EXPECT_EQ(bits(scored->raw), bits(sampled->logprobs.raw));
    EXPECT_EQ(bits(raw->raw), bits(sampled->logprobs.raw));
    EXPECT_EQ(bits(scored->temperature), bits(sampled->logprobs.temperature));
    EXPECT_EQ(temperature->token, sampled->token);
    EXPECT_EQ(bits(temperature->logprobs.temperature), bits(sampled->logprobs.temperature));
    EXPECT_EQ(bits(scored->processed), bits(sampled->logprobs.processed));
    EXPECT_EQ(scored->kept_token_ids, sampled->logprobs.kept_token_ids);
    ASSERT_EQ(scored->top_processed.size(), sampled->logprobs.top_processed.size());
    for (size_t j = 0; j < scored->top_processed.size(); ++j) {
      EXPECT_EQ(scored->top_processed[j].token, sampled->logprobs.top_processed[j].token);
      EXPECT_EQ(bits(scored->top_processed[j].logprob), bits(sampled->logprobs.top_processed[j].logprob));
    }
  }
}

TEST(SamplerDeathTest, PenaltiesNeedCounts) {
  SamplingParams params;
  params.presence_penalty = 1;
  SamplerScratch scratch;
  const TokenHistory history(std::vector<int32_t>{1}, false);
  EXPECT_DEATH((void)SampleRow(std::vector<float>{1, 2}, params, {}, history, {}, scratch), "");
}

}  // namespace
}  // namespace lockstep

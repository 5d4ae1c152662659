#include "sampler/params.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

constexpr int64_t kVocab = 100;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct BadCase {
  std::string message;
  std::function<void(SamplingParams&)> set;
};

TEST(SamplingParamsTest, RefusesWithFieldValueAndRange) {
  const std::vector<BadCase> cases = {
      {"sampling.temperature: value -1 is out of range; want 0, or 0.0001 to 10000",
       [](auto& p) { p.temperature = -1; }},
      {"sampling.temperature: value 1e-05 is out of range; want 0, or 0.0001 to 10000",
       [](auto& p) { p.temperature = 1e-5f; }},
      {"sampling.temperature: value nan is out of range; want 0, or 0.0001 to 10000",
       [](auto& p) { p.temperature = kNan; }},
      {"sampling.temperature: value inf is out of range; want 0, or 0.0001 to 10000",
       [](auto& p) { p.temperature = kInf; }},
      {"sampling.top_p: value 1.5 is out of range; want (0, 1]", [](auto& p) { p.top_p = 1.5f; }},
      {"sampling.top_p: value 0 is out of range; want (0, 1]", [](auto& p) { p.top_p = 0; }},
      {"sampling.top_p: value nan is out of range; want (0, 1]", [](auto& p) { p.top_p = kNan; }},
      {"sampling.top_k: value -1 is out of range; want 0 (off) or more", [](auto& p) { p.top_k = -1; }},
      {"sampling.min_p: value 1 is out of range; want [0, 1)", [](auto& p) { p.min_p = 1; }},
      {"sampling.min_p: value -0.5 is out of range; want [0, 1)", [](auto& p) { p.min_p = -0.5f; }},
      {"sampling.min_p: value nan is out of range; want [0, 1)", [](auto& p) { p.min_p = kNan; }},
      {"sampling.logit_bias key: value 100 is out of range; want a token id, 0 to 99",
       [](auto& p) { p.logit_bias[100] = 1; }},
      {"sampling.logit_bias[3]: value nan is out of range; want -100 to 100", [](auto& p) { p.logit_bias[3] = kNan; }},
      {"sampling.logit_bias[3]: value -100.5 is out of range; want -100 to 100",
       [](auto& p) { p.logit_bias[3] = -100.5f; }},
      {"sampling.allowed_token_ids[1]: value -1 is out of range; want a token id, 0 to 99",
       [](auto& p) {
         p.allowed_token_ids = {5, -1};
       }},
      {"sampling.allowed_token_ids: 262145 entries; want at most 262144",
       [](auto& p) { p.allowed_token_ids.assign(262145, 1); }},
      {"sampling.bad_words[1]: empty; want at least 1 token",
       [](auto& p) {
         p.bad_words = {{1}, {}};
       }},
      {"sampling.bad_words[0][1]: value 100 is out of range; want a token id, 0 to 99",
       [](auto& p) {
         p.bad_words = {{1, 100}};
       }},
      {"sampling.bad_words[0]: 65 entries; want at most 64",
       [](auto& p) { p.bad_words = {std::vector<int32_t>(65, 1)}; }},
      {"sampling.bad_words: 4097 entries; want at most 4096", [](auto& p) { p.bad_words.assign(4097, {1}); }},
      {"sampling.repetition_penalty: value 0 is out of range; want 0.01 to 100",
       [](auto& p) { p.repetition_penalty = 0; }},
      {"sampling.repetition_penalty: value nan is out of range; want 0.01 to 100",
       [](auto& p) { p.repetition_penalty = kNan; }},
      {"sampling.presence_penalty: value 101 is out of range; want -100 to 100",
       [](auto& p) { p.presence_penalty = 101; }},
      {"sampling.frequency_penalty: value -inf is out of range; want -100 to 100",
       [](auto& p) { p.frequency_penalty = -kInf; }},
      {"sampling.min_tokens: value -1 is out of range; want 0 or more", [](auto& p) { p.min_tokens = -1; }},
      {"sampling.stop_token_ids[0]: value 100 is out of range; want a token id, 0 to 99",
       [](auto& p) { p.stop_token_ids = {100}; }},
      {"sampling.stop_token_ids: 4097 entries; want at most 4096", [](auto& p) { p.stop_token_ids.assign(4097, 1); }},
      {"sampling.eos_token_ids[0]: value -5 is out of range; want a token id, 0 to 99",
       [](auto& p) { p.eos_token_ids = {-5}; }},
  };
  for (const BadCase& bad : cases) {
    SamplingParams params;
    bad.set(params);
    const absl::Status status = ValidateSamplingParams(params, kVocab);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.message;
    EXPECT_EQ(std::string(status.message()), bad.message);
  }
}

TEST(SamplingParamsTest, RefusesMasksThatLeaveNothing) {
  const auto message = [](const SamplingParams& params, int64_t generated = 0) {
    return std::string(CheckSomeTokenIsLeft(params, kVocab, generated).message());
  };
  SamplingParams words;
  words.allowed_token_ids = {5, 6};
  words.bad_words = {{5}, {6, 6}};
  EXPECT_EQ(message(words), "");
  words.bad_words.push_back({6});
  EXPECT_EQ(message(words),
            "sampling.allowed_token_ids: none of 2 tokens may be drawn: bad_words of one token mask them all; want at "
            "least one that is left");
  SamplingParams ends;
  ends.allowed_token_ids = {5, 6};
  ends.eos_token_ids = {5};
  ends.stop_token_ids = {6};
  EXPECT_EQ(message(ends), "");
  ends.min_tokens = 2;
  EXPECT_EQ(message(ends, 2), "");
  EXPECT_EQ(message(ends, 1),
            "sampling.allowed_token_ids: none of 2 tokens may be drawn: bad_words of one token, and eos and "
            "stop_token_ids before min_tokens, mask them all; want at least one that is left");
  SamplingParams all;
  for (int32_t token = 1; token < kVocab; ++token) all.bad_words.push_back({token});
  EXPECT_EQ(message(all), "");
  all.bad_words.push_back({0});
  EXPECT_NE(message(all), "");
}

TEST(SamplingParamsTest, RefusesTooManyBiases) {
  SamplingParams params;
  for (int i = 0; i <= kMaxLogitBiasEntries; ++i) params.logit_bias[i] = 0;
  EXPECT_EQ(std::string(ValidateSamplingParams(params, 100352).message()),
            "sampling.logit_bias: 16385 entries; want at most 16384");
}

TEST(SamplingParamsTest, AcceptsDefaultsAndEveryEndOfARange) {
  EXPECT_TRUE(ValidateSamplingParams(SamplingParams{}, kVocab).ok());
  SamplingParams low;
  low.temperature = 0;
  low.top_p = std::numeric_limits<float>::denorm_min();
  low.top_k = 1;
  low.logit_bias = {{0, -100.0f}};
  low.allowed_token_ids = {0, 0};
  low.bad_words = {{0}};
  low.repetition_penalty = kMinRepetitionPenalty;
  low.presence_penalty = low.frequency_penalty = -100;
  low.stop_token_ids = low.eos_token_ids = {0};
  EXPECT_TRUE(ValidateSamplingParams(low, kVocab).ok()) << ValidateSamplingParams(low, kVocab);
  SamplingParams high;
  high.temperature = kMaxTemperature;
  high.top_k = std::numeric_limits<int32_t>::max();
  high.min_p = 0x1.fffffep-1f;
  high.logit_bias = {{99, 100.0f}};
  high.allowed_token_ids = {99};
  high.bad_words = {std::vector<int32_t>(64, 99)};
  high.repetition_penalty = kMaxRepetitionPenalty;
  high.presence_penalty = high.frequency_penalty = 100;
  high.min_tokens = std::numeric_limits<int64_t>::max();
  high.stop_token_ids = high.eos_token_ids = {99};
  EXPECT_TRUE(ValidateSamplingParams(high, kVocab).ok()) << ValidateSamplingParams(high, kVocab);
  SamplingParams coldest;
  coldest.temperature = kMinTemperature;
  EXPECT_TRUE(ValidateSamplingParams(coldest, kVocab).ok());
}

TEST(LogprobOptionsTest, Ranges) {
  LogprobOptions options;
  EXPECT_TRUE(ValidateLogprobOptions(options).ok());
  options.raw = true;
  options.top_k = kMaxTopLogprobs;
  EXPECT_TRUE(ValidateLogprobOptions(options).ok());
  options.top_k = 65;
  EXPECT_EQ(std::string(ValidateLogprobOptions(options).message()),
            "logprobs.top_k: value 65 is out of range; want 0 to 64");
  options.top_k = -1;
  EXPECT_EQ(ValidateLogprobOptions(options).code(), absl::StatusCode::kInvalidArgument);
  options.top_k = 3;
  options.raw = false;
  EXPECT_EQ(std::string(ValidateLogprobOptions(options).message()),
            "logprobs.top_k: value 3 with no kind of log-probability asked for; want 0, or one of raw, temperature and "
            "processed");
}

TEST(NeedsCountsTest, OnlyForPenalties) {
  SamplingParams params;
  params.logit_bias = {{1, 1.0f}};
  params.bad_words = {{1, 2}};
  EXPECT_FALSE(NeedsCounts(params));
  params.repetition_penalty = 1.1f;
  EXPECT_TRUE(NeedsCounts(params));
  params = {};
  params.presence_penalty = -1;
  EXPECT_TRUE(NeedsCounts(params));
  params = {};
  params.frequency_penalty = 0.5f;
  EXPECT_TRUE(NeedsCounts(params));
}

}  // namespace
}  // namespace lockstep

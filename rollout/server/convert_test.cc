#include "rollout/server/convert.h"

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rollout/server/request_ids.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::StartsWith;

RequestContext Context() {
  RequestContext context;
  context.vocab_size = 100;
  context.max_sequence_tokens = 50;
  context.eos_token_ids = {2, 3};
  context.has_tokenizer = true;
  context.limits.max_prompt_tokens = 49;
  context.limits.max_n = 8;
  return context;
}

DrawnDefaults Drawn() {
  return {.request_id = "drawn", .seed = 77};
}

v1::GenerateRequest Valid() {
  v1::GenerateRequest request;
  for (const int32_t id : {10, 11, 12}) request.add_prompt_token_ids(id);
  return request;
}

TEST(ConvertGenerate, FillsInDefaults) {
  const auto converted = ConvertGenerate(Valid(), Context(), Drawn());
  ASSERT_TRUE(converted.ok()) << converted.status();
  const RequestSpec& spec = converted->spec;
  EXPECT_EQ(spec.request_id, "drawn");
  EXPECT_EQ(converted->info.request_id, "drawn");
  EXPECT_THAT(spec.prompt, ElementsAre(10, 11, 12));
  EXPECT_EQ(spec.n, 1);
  EXPECT_EQ(spec.sampling.temperature, 1.0f);
  EXPECT_EQ(spec.sampling.top_p, 1.0f);
  EXPECT_EQ(spec.sampling.repetition_penalty, 1.0f);
  EXPECT_EQ(spec.sampling.seed, 77);
  EXPECT_EQ(converted->info.seed, 77);
  EXPECT_THAT(spec.stop.eos_token_ids, ElementsAre(2, 3));
  EXPECT_THAT(spec.sampling.eos_token_ids, ElementsAre(2, 3));
  EXPECT_EQ(spec.max_tokens, 47);
  EXPECT_TRUE(spec.max_tokens_is_context);
  EXPECT_EQ(spec.time_budget, absl::InfiniteDuration());
  EXPECT_FALSE(spec.logprobs.raw || spec.logprobs.temperature || spec.logprobs.processed);
  EXPECT_EQ(spec.prompt_logprobs.begin, spec.prompt_logprobs.end);
  EXPECT_FALSE(converted->min_weight_version.has_value());
  EXPECT_EQ(converted->stream_interval, 0);
}

TEST(ConvertGenerate, TakesEveryField) {
  v1::GenerateRequest request = Valid();
  request.set_request_id("a:b/c.d_e-F9");
  request.add_generated_prefix_ids(20);
  request.set_n(4);
  request.set_first_sample_index(6);
  request.set_stream_interval(5);
  request.set_time_budget_ms(1500);
  request.mutable_min_weight_version()->set_step(3);
  request.set_priority(-2);
  request.set_session_id("session");
  request.set_cache_salt("salt");
  request.set_detach_on_disconnect(true);
  v1::SamplingParams& sampling = *request.mutable_sampling();
  sampling.set_temperature(0);
  sampling.set_top_p(0.5f);
  sampling.set_top_k(4);
  sampling.set_min_p(0.25f);
  sampling.set_seed(0);
  sampling.set_max_tokens(30);
  sampling.set_min_tokens(2);
  sampling.add_stop_token_ids(9);
  sampling.add_stop_token_sequences()->add_token_ids(8);
  sampling.add_stop_strings("end");
  sampling.set_ignore_eos(true);
  (*sampling.mutable_logit_bias())[5] = -1.5f;
  sampling.add_allowed_token_ids(9);
  sampling.add_allowed_token_ids(10);
  sampling.add_bad_words()->add_token_ids(7);
  sampling.set_repetition_penalty(1.5f);
  sampling.set_presence_penalty(0.5f);
  sampling.set_frequency_penalty(-0.5f);
  v1::LogprobOptions& logprobs = *request.mutable_logprobs();
  logprobs.add_kinds(v1::LOGPROB_KIND_PROCESSED);
  logprobs.add_kinds(v1::LOGPROB_KIND_RAW);
  logprobs.set_top_k(5);
  logprobs.set_kept_token_ids(true);
  logprobs.mutable_prompt();

  const auto converted = ConvertGenerate(request, Context(), Drawn());
  ASSERT_TRUE(converted.ok()) << converted.status();
  const RequestSpec& spec = converted->spec;
  EXPECT_EQ(spec.request_id, "a:b/c.d_e-F9");
  EXPECT_THAT(spec.generated_prefix, ElementsAre(20));
  EXPECT_EQ(spec.n, 4);
  EXPECT_EQ(spec.first_sample_index, 6);
  EXPECT_EQ(converted->stream_interval, 5);
  EXPECT_EQ(spec.time_budget, absl::Milliseconds(1500));
  EXPECT_EQ(converted->min_weight_version->step, 3);
  EXPECT_EQ(spec.priority, -2);
  EXPECT_EQ(spec.cache_salt, "salt");
  EXPECT_EQ(spec.sampling.temperature, 0);
  EXPECT_EQ(spec.sampling.top_p, 0.5f);
  EXPECT_EQ(spec.sampling.top_k, 4);
  EXPECT_EQ(spec.sampling.min_p, 0.25f);
  EXPECT_EQ(spec.sampling.seed, 0) << "zero is a seed like any other";
  EXPECT_EQ(spec.max_tokens, 30);
  EXPECT_FALSE(spec.max_tokens_is_context);
  EXPECT_EQ(spec.sampling.min_tokens, 2);
  EXPECT_THAT(spec.stop.stop_token_ids, ElementsAre(9));
  EXPECT_THAT(spec.sampling.stop_token_ids, ElementsAre(9));
  EXPECT_THAT(spec.stop.stop_token_sequences, ElementsAre(ElementsAre(8)));
  EXPECT_THAT(spec.stop.stop_strings, ElementsAre("end"));
  EXPECT_THAT(spec.stop.eos_token_ids, IsEmpty());
  EXPECT_THAT(spec.sampling.eos_token_ids, IsEmpty());
  EXPECT_EQ(spec.sampling.logit_bias.at(5), -1.5f);
  EXPECT_THAT(spec.sampling.allowed_token_ids, ElementsAre(9, 10));
  EXPECT_THAT(spec.sampling.bad_words, ElementsAre(ElementsAre(7)));
  EXPECT_EQ(spec.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(spec.sampling.presence_penalty, 0.5f);
  EXPECT_EQ(spec.sampling.frequency_penalty, -0.5f);
  EXPECT_TRUE(spec.logprobs.raw && spec.logprobs.processed && !spec.logprobs.temperature);
  EXPECT_EQ(spec.logprobs.top_k, 5);
  EXPECT_EQ(spec.prompt_logprobs.begin, 1);
  EXPECT_EQ(spec.prompt_logprobs.end, 3);
  const RequestInfo& info = converted->info;
  EXPECT_EQ(info.n, 4);
  EXPECT_EQ(info.first_sample_index, 6);
  EXPECT_EQ(info.first_offset, 1);
  EXPECT_EQ(info.max_tokens, 30);
  EXPECT_TRUE(info.detach_on_disconnect);
  EXPECT_TRUE(info.layout.raw && info.layout.processed && info.layout.kept);
  EXPECT_TRUE(info.prompt_layout.raw);
  EXPECT_FALSE(info.prompt_layout.processed || info.prompt_layout.kept) << "nothing was drawn in the prompt";
}

TEST(ConvertGenerate, ClampsOnlyWhenAsked) {
  v1::GenerateRequest request = Valid();
  request.mutable_sampling()->set_max_tokens(47);
  auto converted = ConvertGenerate(request, Context(), Drawn());
  ASSERT_TRUE(converted.ok());
  EXPECT_FALSE(converted->spec.max_tokens_is_context);
  request.mutable_sampling()->set_max_tokens(48);
  EXPECT_THAT(std::string(ConvertGenerate(request, Context(), Drawn()).status().message()),
              StartsWith("sampling.max_tokens: value 48; want at most 47"));
  request.mutable_sampling()->set_clamp(true);
  converted = ConvertGenerate(request, Context(), Drawn());
  ASSERT_TRUE(converted.ok());
  EXPECT_EQ(converted->spec.max_tokens, 47);
  EXPECT_TRUE(converted->spec.max_tokens_is_context);
}

struct BadGenerate {
  std::string field;
  std::function<void(v1::GenerateRequest&)> spoil;
};

// Values at the edges of the ranges; tests/service/test_bad_input.py has the long list.
TEST(ConvertGenerate, NamesTheBadField) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<BadGenerate> cases = {
      {"request_id", [](auto& r) { r.set_request_id(std::string(129, 'a')); }},
      {"request_id", [](auto& r) { r.set_request_id(std::string("a\0b", 3)); }},
      {"prompt_token_ids", [](auto& r) { r.clear_prompt_token_ids(); }},
      {"prompt_token_ids[3]", [](auto& r) { r.add_prompt_token_ids(100); }},
      {"prompt_token_ids",
       [](auto& r) {
         for (int i = 0; i < 47; ++i) r.add_prompt_token_ids(1);
       }},
      {"generated_prefix_ids[0]", [](auto& r) { r.add_generated_prefix_ids(-1); }},
      {"generated_prefix_ids",
       [](auto& r) {
         for (int i = 0; i < 47; ++i) r.add_generated_prefix_ids(1);
       }},
      {"n", [](auto& r) { r.set_n(0); }},
      {"n", [](auto& r) { r.set_n(9); }},
      {"first_sample_index",
       [](auto& r) {
         r.set_first_sample_index(INT32_MAX);
         r.set_n(2);
       }},
      {"stream_interval", [](auto& r) { r.set_stream_interval(-1); }},
      {"sampling.top_p", [nan](auto& r) { r.mutable_sampling()->set_top_p(nan); }},
      {"sampling.temperature", [nan](auto& r) { r.mutable_sampling()->set_temperature(nan); }},
      {"sampling.min_tokens", [](auto& r) { r.mutable_sampling()->set_min_tokens(48); }},
      {"sampling.max_tokens", [](auto& r) { r.mutable_sampling()->set_max_tokens(INT64_MIN); }},
      {"sampling.max_tokens", [](auto& r) { r.mutable_sampling()->set_max_tokens(INT64_MAX); }},
      {"logprobs.top_k", [](auto& r) { r.mutable_logprobs()->set_top_k(1); }},
      {"logprobs.prompt.end",
       [](auto& r) {
         r.mutable_logprobs()->add_kinds(v1::LOGPROB_KIND_RAW);
         r.mutable_logprobs()->mutable_prompt()->set_end(4);
       }},
  };
  for (const BadGenerate& bad : cases) {
    v1::GenerateRequest request = Valid();
    bad.spoil(request);
    const auto converted = ConvertGenerate(request, Context(), Drawn());
    EXPECT_EQ(converted.status().code(), absl::StatusCode::kInvalidArgument) << request.ShortDebugString();
    EXPECT_THAT(std::string(converted.status().message()), StartsWith(bad.field + ":"));
  }
}

TEST(ConvertGenerate, StopStringsNeedATokenizer) {
  v1::GenerateRequest request = Valid();
  request.mutable_sampling()->add_stop_strings("x");
  EXPECT_TRUE(ConvertGenerate(request, Context(), Drawn()).ok());
  RequestContext context = Context();
  context.has_tokenizer = false;
  EXPECT_EQ(ConvertGenerate(request, context, Drawn()).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(ConvertGenerate, KeptIdsMustFitAMessage) {
  v1::GenerateRequest request = Valid();
  request.mutable_logprobs()->set_kept_token_ids(true);
  RequestContext context = Context();
  context.vocab_size = 128'000;
  EXPECT_TRUE(ConvertGenerate(request, context, Drawn()).ok());
  context.vocab_size = 1'000'000;
  EXPECT_THAT(std::string(ConvertGenerate(request, context, Drawn()).status().message()),
              StartsWith("logprobs.kept_token_ids:"));
}

TEST(ConvertScore, HasNoSamples) {
  v1::ScoreRequest request;
  for (int i = 0; i < 50; ++i) request.add_prompt_token_ids(i);
  request.mutable_logprobs()->add_kinds(v1::LOGPROB_KIND_TEMPERATURE);
  request.set_temperature(0.5f);
  const auto converted = ConvertScore(request, Context(), Drawn());
  ASSERT_TRUE(converted.ok()) << converted.status();
  EXPECT_EQ(converted->spec.n, 0);
  EXPECT_EQ(converted->spec.sampling.temperature, 0.5f);
  EXPECT_EQ(converted->spec.prompt_logprobs.begin, 1);
  EXPECT_EQ(converted->spec.prompt_logprobs.end, 50);
  EXPECT_TRUE(converted->info.score);
  request.add_prompt_token_ids(1);
  EXPECT_THAT(std::string(ConvertScore(request, Context(), Drawn()).status().message()),
              StartsWith("prompt_token_ids: 51 tokens; want at most 50"));
}

TEST(ConvertAttach, ResolvesSampleIndices) {
  v1::GenerateRequest request;
  request.set_request_id("r");
  auto* sample = request.mutable_attach()->add_samples();
  sample->set_sample_index(5);
  sample->set_offset(7);
  const auto attach = ConvertAttach(request);
  ASSERT_TRUE(attach.ok()) << attach.status();
  RequestInfo info;
  info.first_sample_index = 4;
  info.n = 2;
  const auto point = ResolveAttach(*attach, info);
  ASSERT_TRUE(point.ok());
  EXPECT_THAT(point->offsets, ElementsAre(std::pair(1, int64_t{7})));
  info.n = 1;
  EXPECT_THAT(std::string(ResolveAttach(*attach, info).status().message()),
              StartsWith("attach.samples[0].sample_index: value 5; want 4 to 4"));
}

TEST(DrawDefaults, AreUuidsAndDiffer) {
  const DrawnDefaults a = DrawDefaults(), b = DrawDefaults();
  EXPECT_THAT(a.request_id,
              ::testing::MatchesRegex("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"));
  EXPECT_NE(a.request_id, b.request_id);
  EXPECT_NE(a.seed, b.seed);
}

}  // namespace
}  // namespace lockstep

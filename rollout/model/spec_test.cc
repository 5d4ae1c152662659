#include "rollout/model/spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "rollout/model/safetensors_writer.h"
#include "rollout/model/spec_fields.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json Hybrid() {
  return {{"model_type", "olmo_hybrid"}, {"vocab_size", 1000},       {"hidden_size", 256},   {"intermediate_size", 512},
          {"num_hidden_layers", 4},      {"num_attention_heads", 4}, {"rope_theta", nullptr}};
}

json Olmo3() {
  return {{"model_type", "olmo3"},    {"vocab_size", 1000},     {"hidden_size", 256},
          {"intermediate_size", 512}, {"num_hidden_layers", 8}, {"num_attention_heads", 4}};
}

// `base` with `changes` laid over it; a value of "<remove>" takes a field out.
json With(json base, const json& changes) {
  for (const auto& [key, value] : changes.items()) {
    if (value == "<remove>") {
      base.erase(key);
    } else {
      base[key] = value;
    }
  }
  return base;
}

absl::StatusOr<ModelSpec> Parse(const json& config, const std::string& generation = "") {
  return ParseModelSpec(config.dump(), generation);
}

ModelSpec Good(const json& config, const std::string& generation = "") {
  auto spec = Parse(config, generation);
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *spec : ModelSpec{};
}

std::string Error(const json& config, const std::string& generation = "") {
  const auto spec = Parse(config, generation);
  if (spec.ok()) return "OK";
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(spec.status().message());
}

std::vector<MixerKind> Mixers(const ModelSpec& spec) {
  std::vector<MixerKind> kinds;
  for (const LayerSpec& layer : spec.layers) kinds.push_back(layer.mixer);
  return kinds;
}

constexpr auto kGdn = MixerKind::kGatedDeltaNet;
constexpr auto kFullMixer = MixerKind::kFullAttention;
constexpr auto kSlidingMixer = MixerKind::kSlidingAttention;

// config.json of the released 7B, in the form OLMo-core's converter writes.
TEST(OlmoHybridSpec, Released7B) {
  std::vector<std::string> types;
  for (int i = 0; i < 32; ++i) types.push_back(i % 4 == 3 ? "full_attention" : "linear_attention");
  const ModelSpec spec = Good({{"architectures", {"OlmoHybridForCausalLM"}},
                               {"model_type", "olmo_hybrid"},
                               {"vocab_size", 100352},
                               {"hidden_size", 3840},
                               {"intermediate_size", 11008},
                               {"num_hidden_layers", 32},
                               {"num_attention_heads", 30},
                               {"num_key_value_heads", 30},
                               {"hidden_act", "silu"},
                               {"max_position_embeddings", 65536},
                               {"initializer_range", 0.02},
                               {"use_cache", true},
                               {"attention_bias", false},
                               {"attention_dropout", 0.0},
                               {"rms_norm_eps", 1e-6},
                               {"tie_word_embeddings", false},
                               {"layer_types", types},
                               {"linear_num_key_heads", 30},
                               {"linear_num_value_heads", 30},
                               {"linear_key_head_dim", 96},
                               {"linear_value_head_dim", 192},
                               {"linear_conv_kernel_dim", 4},
                               {"linear_allow_neg_eigval", true},
                               {"pad_token_id", 100277},
                               {"bos_token_id", nullptr},
                               {"eos_token_id", 100257},
                               {"rope_theta", nullptr},
                               {"dtype", "bfloat16"},
                               {"transformers_version", "5.3.0"}});
  EXPECT_EQ(spec.layers.size(), 32);
  EXPECT_EQ(spec.max_position, 65536);
  EXPECT_EQ(spec.norm_eps, 1e-6f);
  EXPECT_EQ(spec.eos_token_ids, std::vector<int32_t>{100257});
  const LayerSpec& linear = spec.layers[0];
  EXPECT_EQ(linear.mixer, kGdn);
  EXPECT_EQ(linear.norm, NormPlacement::kPre);
  EXPECT_EQ(linear.gdn.key_heads, 30);
  EXPECT_EQ(linear.gdn.value_heads, 30);
  EXPECT_EQ(linear.gdn.key_dim, 96);
  EXPECT_EQ(linear.gdn.value_dim, 192);
  EXPECT_EQ(linear.gdn.conv_width, 4);
  EXPECT_TRUE(linear.gdn_neg_eigval);
  EXPECT_EQ(linear.gdn_norm_eps, 1e-5f);
  const LayerSpec& full = spec.layers[3];
  EXPECT_EQ(full.mixer, kFullMixer);
  EXPECT_EQ(full.norm, NormPlacement::kPost);
  EXPECT_EQ(full.attention.heads, 30);
  EXPECT_EQ(full.attention.head_dim, 128);
  EXPECT_EQ(full.attention.window, 0);
  EXPECT_EQ(full.attention.scale, static_cast<float>(1 / std::sqrt(128.0)));
  EXPECT_FALSE(full.rope.has_value());
  // 7.43 B in the project's figures.
  EXPECT_NEAR(static_cast<double>(spec.parameter_count()), 7.43e9, 0.01e9);
}

TEST(OlmoHybridSpec, DefaultsAreTransformers) {
  const ModelSpec spec = Good(With(Hybrid(), {{"num_hidden_layers", 6}}));
  EXPECT_THAT(Mixers(spec), ElementsAre(kGdn, kGdn, kGdn, kFullMixer, kGdn, kGdn));
  EXPECT_EQ(spec.max_position, 65536);
  EXPECT_EQ(spec.norm_eps, 1e-6f);
  EXPECT_FALSE(spec.tied_embeddings);
  EXPECT_TRUE(spec.eos_token_ids.empty());
  const LayerSpec& linear = spec.layers[0];
  EXPECT_EQ(linear.gdn.key_heads, 4);
  EXPECT_EQ(linear.gdn.value_heads, 4);
  EXPECT_EQ(linear.gdn.key_dim, 48);  // 0.75 * 256 / 4
  EXPECT_EQ(linear.gdn.value_dim, 96);
  EXPECT_EQ(linear.gdn.conv_width, 4);
  EXPECT_TRUE(linear.gdn_neg_eigval);
  EXPECT_EQ(spec.layers[3].attention.kv_heads, 4);
  EXPECT_EQ(spec.layers[3].attention.head_dim, 64);
  // Fewer than four layers: the last one is full.
  EXPECT_THAT(Mixers(Good(With(Hybrid(), {{"num_hidden_layers", 2}}))), ElementsAre(kGdn, kFullMixer));
  // 0.75 * 256 / 5 = 38.4 is cut to an integer, as Python's int does.
  EXPECT_EQ(Good(With(Hybrid(), {{"linear_num_key_heads", 5}, {"linear_num_value_heads", 10}})).layers[0].gdn.key_dim,
            38);
}

TEST(OlmoHybridSpec, Branches) {
  const ModelSpec spec = Good(With(Hybrid(), {{"num_key_value_heads", 2},
                                              {"head_dim", 32},
                                              {"linear_num_key_heads", 2},
                                              {"linear_num_value_heads", 6},
                                              {"linear_key_head_dim", 16},
                                              {"linear_value_head_dim", 24},
                                              {"linear_conv_kernel_dim", 3},
                                              {"linear_allow_neg_eigval", false},
                                              {"tie_word_embeddings", true},
                                              {"rope_theta", 10000.0},
                                              {"layer_types", {"mamba", "attention", "conv", "full_attention"}}}));
  EXPECT_THAT(Mixers(spec), ElementsAre(kGdn, kFullMixer, kGdn, kFullMixer));
  EXPECT_TRUE(spec.tied_embeddings);
  EXPECT_EQ(spec.layers[0].gdn.conv_channels(), 2 * 32 + 144);
  EXPECT_EQ(spec.layers[0].gdn.conv_width, 3);
  EXPECT_FALSE(spec.layers[0].gdn_neg_eigval);
  EXPECT_FALSE(spec.layers[0].rope.has_value());
  EXPECT_EQ(spec.layers[1].attention.kv_heads, 2);
  EXPECT_EQ(spec.layers[1].attention.head_dim, 32);
  ASSERT_TRUE(spec.layers[1].rope.has_value());
  EXPECT_EQ(spec.layers[1].rope->inv_freq.size(), 16);
  // embedding (tied) + 2 linear + 2 full + final norm
  const int64_t mlp = 3 * 256 * 512 + 2 * 256;
  const int64_t linear = 256 * (32 + 32 + 144 + 144 + 6 + 6 + 144) + 208 * 3 + 6 + 6 + 24 + mlp;
  const int64_t full = 256 * (128 + 64 + 64 + 128) + 128 + 64 + mlp;
  EXPECT_EQ(spec.parameter_count(), 1000 * 256 + 2 * linear + 2 * full + 256);
}

TEST(OlmoHybridSpec, AllLinearIsAModel) {
  const ModelSpec spec = Good(With(Hybrid(), {{"rope_theta", "<remove>"},
                                              {"num_hidden_layers", 2},
                                              {"layer_types", {"linear_attention", "linear_attention"}}}));
  EXPECT_THAT(Mixers(spec), ElementsAre(kGdn, kGdn));
}

TEST(Olmo3Spec, DefaultsAreTransformers) {
  const ModelSpec spec = Good(Olmo3());
  EXPECT_THAT(Mixers(spec), ElementsAre(kSlidingMixer, kSlidingMixer, kSlidingMixer, kFullMixer, kSlidingMixer,
                                        kSlidingMixer, kSlidingMixer, kFullMixer));
  EXPECT_EQ(spec.max_position, 2048);
  EXPECT_EQ(spec.norm_eps, 1e-5f);
  EXPECT_EQ(spec.layers[0].attention.window, 4096);
  EXPECT_EQ(spec.layers[3].attention.window, 0);
  for (const LayerSpec& layer : spec.layers) {
    EXPECT_EQ(layer.norm, NormPlacement::kPost);
    EXPECT_TRUE(layer.rope.has_value());
  }
}

TEST(Olmo3Spec, FullAttentionNeedsNoWindow) {
  const ModelSpec spec =
      Good(With(Olmo3(), {{"num_hidden_layers", 1}, {"layer_types", {"full_attention"}}, {"sliding_window", nullptr}}));
  EXPECT_EQ(spec.layers[0].attention.window, 0);
}

TEST(Spec, FieldsWithoutEffectAreIgnored) {
  EXPECT_EQ(Error(With(Hybrid(), {{"pad_token_id", -1},
                                  {"temperature", 0.6},
                                  {"linear_a_log_min", 0},
                                  {"quantization_config", nullptr},
                                  {"sliding_window", nullptr},
                                  {"partial_rotary_factor", 1.0},
                                  {"num_key_value_heads", nullptr},
                                  {"head_dim", nullptr},
                                  {"id2label", {{"0", "LABEL_0"}}},
                                  {"linear_use_gate", true}})),
            "OK");
}

TEST(Spec, EosComesFromTheGenerationConfigFirst) {
  const json config = With(Hybrid(), {{"eos_token_id", {5, 6, 5}}});
  EXPECT_THAT(Good(config).eos_token_ids, ElementsAre(5, 6));
  EXPECT_THAT(Good(config, R"({"eos_token_id": 7, "temperature": 0.6, "anything": {}})").eos_token_ids, ElementsAre(7));
  EXPECT_THAT(Good(config, R"({"eos_token_id": [8, 9]})").eos_token_ids, ElementsAre(8, 9));
  EXPECT_THAT(Good(config, R"({"eos_token_id": null})").eos_token_ids, ElementsAre(5, 6));
  EXPECT_THAT(Good(config, "{}").eos_token_ids, ElementsAre(5, 6));
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"{", "parse error"},
           {"[]", "want an object"},
           {R"({"eos_token_id": 1, "eos_token_id": 2})", "\"eos_token_id\" appears twice"},
           {R"({"eos_token_id": 1000})", "eos_token_id: value 1000, want token ids from 0 to 999"},
           {R"({"eos_token_id": [1, -1]})", "eos_token_id: value [1,-1]"},
           {R"({"eos_token_id": "</s>"})", "eos_token_id"},
           {R"({"eos_token_id": true})", "eos_token_id"},
           {R"({"eos_token_id": [[1]]})", "eos_token_id"},
       }) {
    EXPECT_THAT(Error(config, text), AllOf(HasSubstr("generation_config.json"), HasSubstr(message))) << text;
  }
}

struct BadConfig {
  std::string name;
  json config;
  std::vector<std::string> message;
};

class BadSpec : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadSpec, IsRefusedByName) {
  const std::string message = Error(GetParam().config);
  EXPECT_THAT(message, HasSubstr("config.json: "));
  for (const std::string& part : GetParam().message) EXPECT_THAT(message, HasSubstr(part));
}

json H(const json& changes) {
  return With(Hybrid(), changes);
}
json O(const json& changes) {
  return With(Olmo3(), changes);
}
json Yarn(const json& changes) {
  return With(
      {{"rope_type", "yarn"}, {"rope_theta", 500000.0}, {"factor", 8.0}, {"original_max_position_embeddings", 8192}},
      changes);
}

std::vector<BadConfig> BadConfigs() {
  std::vector<BadConfig> cases = {
      {"model_type_absent",
       H({{"model_type", "<remove>"}}),
       {"model_type: value missing", "\"olmo_hybrid\" or \"olmo3\""}},
      {"model_type_other", H({{"model_type", "llama"}}), {"model_type: value \"llama\""}},
      {"model_type_number", H({{"model_type", 3}}), {"model_type: value 3, want a string"}},
      {"unknown_field", H({{"mystery", 3}}), {"mystery: value 3", "not known"}},
      {"unknown_null", H({{"mystery", nullptr}}), {"mystery: value null"}},
      {"unknown_false", O({{"use_sliding_window", false}}), {"use_sliding_window: value false"}},
      {"moe",
       H({{"num_experts", 8}, {"num_experts_per_tok", 2}}),
       {"num_experts: value 8", "num_experts_per_tok: value 2"}},
      {"hidden_act_gelu", H({{"hidden_act", "gelu"}}), {"hidden_act: value \"gelu\", want \"silu\""}},
      {"hidden_act_null", H({{"hidden_act", nullptr}}), {"hidden_act: value null, want \"silu\""}},
      {"attention_bias", H({{"attention_bias", true}}), {"attention_bias: value true, want false"}},
      {"attention_bias_olmo3", O({{"attention_bias", true}}), {"attention_bias: value true"}},
      {"quantization",
       H({{"quantization_config", {{"quant_method", "fp8"}}}}),
       {"quantization_config: value {\"quant_method\":\"fp8\"}, want none"}},
      {"auto_map", H({{"auto_map", {{"AutoModelForCausalLM", "x.Y"}}}}), {"auto_map", "Python code"}},
      {"per_layer_config", H({{"per_layer_config", {{"0", json::object()}}}}), {"per_layer_config"}},
      {"encoder_decoder", H({{"is_encoder_decoder", true}}), {"is_encoder_decoder: value true, want false"}},
      {"pruned_heads", H({{"pruned_heads", {{"0", {1}}}}}), {"pruned_heads"}},
      {"partial_rotary", H({{"partial_rotary_factor", 0.5}}), {"partial_rotary_factor: value 0.5"}},
      {"no_gate", H({{"linear_use_gate", false}}), {"linear_use_gate: value false, want true"}},
      {"window_in_hybrid", H({{"sliding_window", 128}}), {"sliding_window: value 128, want none"}},
      {"tie_number", H({{"tie_word_embeddings", 1}}), {"tie_word_embeddings: value 1, want true or false"}},
      {"tie_null", H({{"tie_word_embeddings", nullptr}}), {"tie_word_embeddings: value null, want true or false"}},
      {"neg_eigval_string", H({{"linear_allow_neg_eigval", "yes"}}), {"linear_allow_neg_eigval: value \"yes\""}},
      {"heads_not_divided",
       H({{"num_attention_heads", 6}}),
       {"num_attention_heads: value 6, want a divisor of hidden_size, 256"}},
      {"more_heads_than_hidden", H({{"num_attention_heads", 512}}), {"num_attention_heads: value 512"}},
      {"kv_heads_not_dividing",
       H({{"num_key_value_heads", 3}}),
       {"num_key_value_heads: value 3, want a divisor of num_attention_heads, 4"}},
      {"kv_heads_more", H({{"num_key_value_heads", 8}}), {"num_key_value_heads: value 8, want a divisor"}},
      {"value_heads_fewer",
       H({{"linear_num_value_heads", 2}}),
       {"linear_num_value_heads: value 2, want a multiple of linear_num_key_heads, 4"}},
      {"value_heads_not_multiple",
       H({{"linear_num_value_heads", 6}}),
       {"linear_num_value_heads: value 6, want a multiple"}},
      {"key_dim_default_zero",
       H({{"linear_num_key_heads", 512}, {"linear_num_value_heads", 512}}),
       {"linear_num_key_heads: value 512", "head sizes"}},
      {"conv_one",
       H({{"linear_conv_kernel_dim", 1}}),
       {"linear_conv_kernel_dim: value 1, want an integer from 2 to 8"}},
      {"conv_nine", H({{"linear_conv_kernel_dim", 9}}), {"linear_conv_kernel_dim: value 9"}},
      {"odd_head_dim_with_rope",
       H({{"head_dim", 33}, {"rope_theta", 10000}}),
       {"head_dim: value 33, want an even head size"}},
      {"odd_derived_head_dim",
       O({{"hidden_size", 260}}),
       {"hidden_size: value 260, want an even head size with RoPE, not 65"}},
      {"eps_zero", H({{"rms_norm_eps", 0.0}}), {"rms_norm_eps: value 0.0, want a number above 0 and below 1"}},
      {"eps_negative", H({{"rms_norm_eps", -1e-6}}), {"rms_norm_eps: value -1e-06"}},
      {"eps_underflows", H({{"rms_norm_eps", 1e-60}}), {"rms_norm_eps: value 1e-60"}},
      {"eps_string", H({{"rms_norm_eps", "1e-6"}}), {"rms_norm_eps: value \"1e-6\""}},
      {"layers_not_listed",
       H({{"layer_types", {"linear_attention"}}}),
       {"layer_types: value [\"linear_attention\"], want a list of 4 names"}},
      {"layers_string", H({{"layer_types", "linear_attention"}}), {"layer_types: value \"linear_attention\""}},
      {"layers_numbers", H({{"layer_types", {1, 2, 3, 4}}}), {"layer_types: value [1,2,3,4]"}},
      {"layers_empty", H({{"layer_types", json::array()}}), {"layer_types: value []"}},
      {"layers_sliding_in_hybrid",
       H({{"num_hidden_layers", 2}, {"layer_types", {"linear_attention", "sliding_attention"}}}),
       {"layer_types", "not \"sliding_attention\""}},
      {"layers_all_full",
       H({{"num_hidden_layers", 2}, {"layer_types", {"full_attention", "full_attention"}}}),
       {"layer_types", "at least one"}},
      {"one_layer_default",
       H({{"num_hidden_layers", 1}}),
       {"layer_types: value missing, want at least one \"linear_attention\""}},
      {"layers_linear_in_olmo3",
       O({{"num_hidden_layers", 1}, {"layer_types", {"linear_attention"}}}),
       {"layer_types", "not \"linear_attention\""}},
      {"layers_legacy_in_olmo3",
       O({{"num_hidden_layers", 1}, {"layer_types", {"attention"}}}),
       {"layer_types", "not \"attention\""}},
      {"hybrid_field_in_olmo3", O({{"linear_key_head_dim", 96}}), {"linear_key_head_dim: value 96"}},
      {"window_null", O({{"sliding_window", nullptr}}), {"sliding_window: value null, want a number of positions"}},
      {"window_zero", O({{"sliding_window", 0}}), {"sliding_window: value 0, want an integer from 1"}},
      {"eos_out_of_vocab", H({{"eos_token_id", 1000}}), {"eos_token_id: value 1000, want token ids from 0 to 999"}},
      {"eos_negative", H({{"eos_token_id", {3, -1}}}), {"eos_token_id: value [3,-1]"}},
      {"eos_bool", H({{"eos_token_id", true}}), {"eos_token_id: value true"}},
      {"original_length_outside",
       H({{"original_max_position_embeddings", 128}}),
       {"original_max_position_embeddings: value 128"}},
      // RoPE
      {"theta_one", H({{"rope_theta", 1.0}}), {"rope_theta: value 1.0, want a number above 1"}},
      {"theta_negative", H({{"rope_theta", -10000}}), {"rope_theta: value -10000"}},
      {"theta_string", H({{"rope_theta", "10000"}}), {"rope_theta: value \"10000\""}},
      {"theta_huge", H({{"rope_theta", 1e300}}), {"rope_theta: value 1e+300"}},
      {"theta_differs",
       H({{"rope_theta", 5000.0}, {"rope_parameters", {{"rope_theta", 10000.0}}}}),
       {"rope_theta: value 5000.0, want 10000.0, as rope_parameters says"}},
      {"theta_null_and_not",
       H({{"rope_parameters", {{"rope_theta", 10000.0}}}}),
       {"rope_theta: value null, want 10000.0"}},
      {"rope_list", H({{"rope_parameters", {1}}}), {"rope_parameters: value [1], want an object"}},
      {"rope_type_unknown",
       H({{"rope_parameters", {{"rope_type", "longrope"}}}}),
       {"rope_parameters.rope_type: value \"longrope\", want \"default\", \"linear\" or \"yarn\""}},
      {"rope_type_llama3", H({{"rope_scaling", {{"type", "llama3"}}}}), {"rope_scaling.type: value \"llama3\""}},
      {"rope_type_null", H({{"rope_parameters", {{"rope_type", nullptr}}}}), {"rope_parameters.rope_type: value null"}},
      {"rope_type_number",
       H({{"rope_parameters", {{"rope_type", 1}}}}),
       {"rope_parameters.rope_type: value 1, want a string"}},
      {"rope_types_differ",
       H({{"rope_parameters", {{"rope_type", "default"}, {"type", "linear"}, {"factor", 2.0}}}}),
       {"rope_parameters.type: value \"linear\", want \"default\""}},
      {"rope_two_forms",
       H({{"rope_parameters", {{"rope_type", "default"}}}, {"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}),
       {"rope_scaling", "absent beside rope_parameters"}},
      {"rope_unknown_key",
       H({{"rope_parameters", {{"rope_type", "default"}, {"mystery", 1}}}}),
       {"rope_parameters.mystery: value 1"}},
      {"rope_factor_for_default",
       H({{"rope_parameters", {{"rope_type", "default"}, {"factor", 2.0}}}}),
       {"rope_parameters.factor: value 2.0"}},
      {"rope_per_type_in_hybrid",
       H({{"rope_parameters", {{"full_attention", {{"rope_theta", 1e4}}}}}}),
       {"rope_parameters.full_attention"}},
      {"rope_partial",
       H({{"rope_parameters", {{"partial_rotary_factor", 0.5}}}}),
       {"rope_parameters.partial_rotary_factor: value 0.5"}},
      {"linear_no_factor",
       H({{"rope_parameters", {{"rope_type", "linear"}}}}),
       {"rope_parameters.factor: value missing, want a number of at least 1"}},
      {"linear_factor_null",
       H({{"rope_parameters", {{"rope_type", "linear"}, {"factor", nullptr}}}}),
       {"rope_parameters.factor: value null"}},
      {"linear_factor_small",
       H({{"rope_parameters", {{"rope_type", "linear"}, {"factor", 0.5}}}}),
       {"rope_parameters.factor: value 0.5"}},
      {"yarn_no_factor",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"factor", "<remove>"}})}}),
       {"rope_parameters.factor: value missing"}},
      {"yarn_original_null",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"original_max_position_embeddings", nullptr}})}}),
       {"original_max_position_embeddings: value null"}},
      {"yarn_original_float",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"original_max_position_embeddings", 8192.0}})}}),
       {"original_max_position_embeddings: value 8192.0"}},
      {"yarn_betas",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"beta_fast", 1.0}, {"beta_slow", 2.0}})}}),
       {"rope_parameters.beta_fast: value 1.0, want at least beta_slow, 2"}},
      {"yarn_beta_zero",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"beta_fast", 0}})}}),
       {"rope_parameters.beta_fast: value 0"}},
      {"yarn_attention_factor",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"attention_factor", -1.0}})}}),
       {"rope_parameters.attention_factor: value -1.0"}},
      {"yarn_truncate_null",
       H({{"rope_theta", "<remove>"}, {"rope_parameters", Yarn({{"truncate", nullptr}})}}),
       {"rope_parameters.truncate: value null"}},
      {"olmo3_flat",
       O({{"rope_parameters", {{"rope_theta", 1e4}, {"rope_type", "default"}}}}),
       {"rope_parameters.rope_theta: value 10000.0", "rope_parameters.rope_type"}},
      {"olmo3_type_list",
       O({{"rope_parameters", {{"full_attention", {1}}}}}),
       {"rope_parameters.full_attention: value [1], want an object"}},
      {"olmo3_type_only", O({{"rope_scaling", {{"type", "yarn"}, {"factor", 8.0}}}}), {"rope_scaling", "rope_type"}},
      {"olmo3_theta_null", O({{"rope_theta", nullptr}}), {"rope_theta: value null, want a number"}},
      {"olmo3_theta_null_inside",
       O({{"rope_parameters", {{"sliding_attention", {{"rope_theta", nullptr}}}}}}),
       {"rope_parameters.sliding_attention.rope_theta: value null"}},
      {"olmo3_theta_differs",
       O({{"rope_theta", 2.0}, {"rope_parameters", {{"full_attention", {{"rope_theta", 3.0}}}}}}),
       {"rope_theta: value 2.0, want 3.0"}},
      {"olmo3_truncate",
       O({{"rope_parameters", {{"full_attention", Yarn({{"truncate", false}})}}}}),
       {"rope_parameters.full_attention.truncate: value false, want true"}},
      {"olmo3_two_forms",
       O({{"rope_scaling", Yarn({})}, {"rope_parameters", {{"full_attention", Yarn({})}}}}),
       {"rope_scaling", "absent"}},
  };
  // Every size: absent where it has no default, of a wrong type, below and above its range.
  struct Size {
    const char* name;
    bool required;
    int64_t high;
  };
  for (const Size& size :
       {Size{"vocab_size", true, kMaxVocab}, Size{"hidden_size", true, kMaxHidden},
        Size{"intermediate_size", true, kMaxIntermediate}, Size{"num_hidden_layers", true, kMaxLayers},
        Size{"num_attention_heads", true, kMaxHeads}, Size{"num_key_value_heads", false, kMaxHeads},
        Size{"head_dim", false, kMaxHeadDim}, Size{"max_position_embeddings", false, kMaxPosition},
        Size{"linear_num_key_heads", false, kMaxHeads}, Size{"linear_num_value_heads", false, kMaxHeads},
        Size{"linear_key_head_dim", false, kMaxHeadDim}, Size{"linear_value_head_dim", false, kMaxHeadDim}}) {
    const std::string name = size.name;
    const std::string want = ", want an integer from 1 to " + std::to_string(size.high);
    if (size.required) {
      cases.push_back({name + "_absent", H({{name, "<remove>"}}), {name + ": value missing" + want}});
      cases.push_back({name + "_null", H({{name, nullptr}}), {name + ": value null" + want}});
    }
    cases.push_back({name + "_zero", H({{name, 0}}), {name + ": value 0" + want}});
    cases.push_back({name + "_negative", H({{name, -3}}), {name + ": value -3" + want}});
    cases.push_back(
        {name + "_above", H({{name, size.high + 1}}), {name + ": value " + std::to_string(size.high + 1) + want}});
    cases.push_back({name + "_float", H({{name, 4.0}}), {name + ": value 4.0" + want}});
    cases.push_back({name + "_string", H({{name, "4"}}), {name + ": value \"4\"" + want}});
    cases.push_back({name + "_bool", H({{name, true}}), {name + ": value true" + want}});
    cases.push_back(
        {name + "_u64", H({{name, 18446744073709551615u}}), {name + ": value 18446744073709551615" + want}});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Table, BadSpec, ::testing::ValuesIn(BadConfigs()),
                         [](const auto& test) { return test.param.name; });

TEST(Spec, BadJsonIsRefused) {
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"", "parse error"},
           {"null", "want an object"},
           {"[]", "want an object"},
           {"{\"model_type\": \"olmo3\",}", "parse error"},
           {R"({"rms_norm_eps": NaN})", "parse error"},
           {R"({"rms_norm_eps": 1e999})", "overflow"},
           {R"({"hidden_size": 1, "hidden_size": 2})", "\"hidden_size\" appears twice"},
           {R"({"rope_parameters": {"factor": 1, "factor": 2}})", "\"factor\" appears twice"},
           {std::string(100, '[') + std::string(100, ']'), "nested deeper"},
       }) {
    const auto spec = ParseModelSpec(text, "");
    ASSERT_FALSE(spec.ok()) << text;
    EXPECT_THAT(std::string(spec.status().message()), AllOf(HasSubstr("config.json"), HasSubstr(message))) << text;
  }
}

TEST(Spec, AllErrorsAreNamedAtOnce) {
  const std::string message = Error(H({{"hidden_act", "relu"}, {"vocab_size", 0}, {"mystery", 1}}));
  EXPECT_THAT(message, AllOf(HasSubstr("hidden_act"), HasSubstr("vocab_size"), HasSubstr("mystery")));
  json many = Hybrid();
  for (int i = 0; i < 30; ++i) many["mystery" + std::to_string(i)] = i;
  EXPECT_THAT(Error(many), HasSubstr("; and 10 more"));
}

TEST(Spec, LongValuesAreCutInMessages) {
  EXPECT_LT(Error(H({{"mystery", std::string(100000, 'x')}})).size(), 300);
  EXPECT_LT(Error(H({{"num_hidden_layers", 1}, {"layer_types", {std::string(100000, 'x')}}})).size(), 500);
}

// The limits leave room: the largest sizes of all together do not overflow.
TEST(Spec, LargestSizesDoNotOverflow) {
  const ModelSpec spec = Good({{"model_type", "olmo_hybrid"},
                               {"vocab_size", kMaxVocab},
                               {"hidden_size", kMaxHidden},
                               {"intermediate_size", kMaxIntermediate},
                               {"num_hidden_layers", kMaxLayers},
                               {"num_attention_heads", kMaxHeads},
                               {"head_dim", kMaxHeadDim},
                               {"linear_num_key_heads", kMaxHeads},
                               {"linear_num_value_heads", kMaxHeads},
                               {"linear_key_head_dim", kMaxHeadDim},
                               {"linear_value_head_dim", kMaxHeadDim},
                               {"rope_theta", nullptr}});
  EXPECT_GT(spec.parameter_count(), int64_t{1} << 50);
  EXPECT_LT(spec.parameter_count(), int64_t{1} << 58);
}

TEST(LoadModelSpec, ReadsBothFiles) {
  testing::TempDir dir;
  EXPECT_EQ(LoadModelSpec(dir.path()).status().code(), absl::StatusCode::kNotFound);
  testing::WriteFile(dir.path() / "config.json", Hybrid().dump());
  auto spec = LoadModelSpec(dir.path());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_TRUE(spec->eos_token_ids.empty());
  testing::WriteFile(dir.path() / "generation_config.json", R"({"eos_token_id": 3})");
  spec = LoadModelSpec(dir.path());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(spec->eos_token_ids, ElementsAre(3));
  testing::WriteFile(dir.path() / "generation_config.json", "");
  EXPECT_THAT(std::string(LoadModelSpec(dir.path()).status().message()),
              AllOf(HasSubstr(dir.path().string()), HasSubstr("generation_config.json")));
}

}  // namespace
}  // namespace lockstep

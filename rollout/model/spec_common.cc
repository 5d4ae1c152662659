#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "rollout/model/spec_fields.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Fields that change no log-probability of these models: descriptions, training, the Python API's return types,
// defaults of transformers' own generate(), and choices among kernels and dtypes, which here are the numerics
// profile's. docs/models.md lists them with reasons.
constexpr std::string_view kWithoutEffect[] = {
    // what the checkpoint is
    "architectures",
    "transformers_version",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_from_model_config",
    "tokenizer_class",
    "torch_dtype",
    "dtype",
    "finetuning_task",
    "task_specific_params",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    // training
    "initializer_range",
    "attention_dropout",
    "gradient_checkpointing",
    // how Python code runs it and what it returns
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_return_dict",
    "keys_to_ignore_at_inference",
    "torchscript",
    "tf_legacy_loss",
    "use_bfloat16",
    "chunk_size_feed_forward",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "_experts_implementation_internal",
    "cache_implementation",
    "is_decoder",
    "prefix",
    // special tokens that only tokenizers and generate() use
    "pad_token_id",
    "bos_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    // generate()'s defaults, which older versions wrote here; a request has its own
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
};

// Fields of which one value is implemented: another would change the output.
void ExpectImplementedValues(ConfigFields& config) {
  config.Expect("hidden_act", {"silu"}, "\"silu\"");
  config.Expect("attention_bias", {false}, "false: projections with biases are not implemented");
  config.Expect("quantization_config", {nullptr}, "none: quantised weights are not implemented");
  config.Expect("per_layer_config", {nullptr}, "none: layers that differ from the config are not implemented");
  config.Expect("auto_map", {nullptr}, "none: the checkpoint's own Python code may compute something else");
  config.Expect("is_encoder_decoder", {false}, "false");
  config.Expect("add_cross_attention", {false}, "false");
  config.Expect("cross_attention_hidden_size", {nullptr}, "none");
  config.Expect("tie_encoder_decoder", {false}, "false");
  config.Expect("pruned_heads", {nullptr, json::object()}, "none");
  config.Expect("partial_rotary_factor", {nullptr, 1}, "1: only whole heads are rotated");
  config.Expect("linear_use_gate", {true}, "true: the ungated output norm is not implemented");
}

}  // namespace

void ParseCommonFields(ConfigFields& config, int64_t default_max_position, double default_norm_eps, ModelSpec& spec) {
  spec.vocab_size = config.Int("vocab_size", std::nullopt, 1, kMaxVocab);
  spec.hidden_size = config.Int("hidden_size", std::nullopt, 1, kMaxHidden);
  spec.intermediate_size = config.Int("intermediate_size", std::nullopt, 1, kMaxIntermediate);
  spec.max_position = config.Int("max_position_embeddings", default_max_position, 1, kMaxPosition);
  spec.norm_eps = static_cast<float>(config.Number("rms_norm_eps", 0, 1).value_or(default_norm_eps));
  if (spec.norm_eps <= 0) config.Error("rms_norm_eps", "a number that is not 0 in fp32");
  spec.tied_embeddings = config.Bool("tie_word_embeddings", false);
  ExpectImplementedValues(config);
  config.Ignore(kWithoutEffect);
}

AttentionShape ParseAttentionShape(ConfigFields& config, int64_t hidden_size) {
  AttentionShape shape;
  shape.heads = config.Int("num_attention_heads", std::nullopt, 1, kMaxHeads);
  shape.kv_heads = config.Int("num_key_value_heads", shape.heads, 1, kMaxHeads);
  if (shape.heads % shape.kv_heads != 0) {
    config.Error("num_key_value_heads", absl::StrCat("a divisor of num_attention_heads, ", shape.heads));
  }
  if (config.Get("head_dim") != nullptr) {
    shape.head_dim = config.Int("head_dim", std::nullopt, 1, kMaxHeadDim);
  } else {
    shape.head_dim = std::max<int64_t>(1, hidden_size / shape.heads);
    if (hidden_size % shape.heads != 0) {
      config.Error("num_attention_heads",
                   absl::StrCat("a divisor of hidden_size, ", hidden_size, ", since there is no head_dim"));
    } else if (shape.head_dim > kMaxHeadDim) {
      config.Error("num_attention_heads", absl::StrCat("at least hidden_size / ", kMaxHeadDim));
    }
  }
  // Python's head_dim**-0.5, a double, as it enters fp32 arithmetic.
  shape.scale = static_cast<float>(std::pow(static_cast<double>(shape.head_dim), -0.5));
  return shape;
}

std::vector<std::string> ParseLayerTypes(ConfigFields& config, int64_t count) {
  const json* value = config.Get("layer_types");
  if (value == nullptr) return {};
  const bool is_list =
      value->is_array() && std::all_of(value->begin(), value->end(), [](const json& v) { return v.is_string(); });
  if (!is_list || static_cast<int64_t>(value->size()) != count) {
    config.Error("layer_types", absl::StrCat("a list of ", count, " names, as num_hidden_layers says"));
    return {};
  }
  return value->get<std::vector<std::string>>();
}

}  // namespace lockstep

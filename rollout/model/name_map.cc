#include "rollout/model/name_map.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

class Builder {
 public:
  explicit Builder(const ModelSpec& spec) : spec_(spec) {}

  std::vector<TensorSpec> Build() {
    Add(kEmbeddingName, {spec_.vocab_size, spec_.hidden_size});
    for (int64_t i = 0; i < static_cast<int64_t>(spec_.layers.size()); ++i) Layer(LayerPrefix(i), spec_.layers[i]);
    Add("model.norm.weight", {spec_.hidden_size});
    Add(kHeadName, {spec_.vocab_size, spec_.hidden_size}).tied = spec_.tied_embeddings;
    return std::move(tensors_);
  }

 private:
  TensorSpec& Add(std::string name, std::vector<int64_t> shape) {
    tensors_.push_back(
        {.name = std::move(name), .shape = std::move(shape), .aliases = {}, .parts = {}, .part_rows = {}});
    return tensors_.back();
  }

  void Layer(const std::string& prefix, const LayerSpec& layer) {
    const int64_t hidden = spec_.hidden_size;
    if (layer.mixer == MixerKind::kGatedDeltaNet) {
      Gdn(prefix + "linear_attn.", layer.gdn);
    } else {
      Attention(prefix + "self_attn.", layer.attention);
    }
    Add(prefix + "mlp.gate_proj.weight", {spec_.intermediate_size, hidden});
    Add(prefix + "mlp.up_proj.weight", {spec_.intermediate_size, hidden});
    Add(prefix + "mlp.down_proj.weight", {hidden, spec_.intermediate_size});
    // transformers stores olmo_hybrid's norms under older names, and renames whatever matches: the attention layers'
    // post_attention_layernorm becomes feedforward_layer_norm too, though it is not the norm of the MLP there.
    const bool renamed = spec_.model_type == "olmo_hybrid";
    TensorSpec& after_attention = Add(prefix + "post_attention_layernorm.weight", {hidden});
    if (renamed) after_attention.aliases.push_back(prefix + "feedforward_layer_norm.weight");
    if (layer.norm == NormPlacement::kPre) {
      TensorSpec& input = Add(prefix + "input_layernorm.weight", {hidden});
      if (renamed) input.aliases.push_back(prefix + "attention_layer_norm.weight");
    } else {
      Add(prefix + "post_feedforward_layernorm.weight", {hidden});
    }
  }

  void Attention(const std::string& prefix, const AttentionShape& shape) {
    const int64_t hidden = spec_.hidden_size;
    const int64_t q_width = shape.heads * shape.head_dim;
    const int64_t kv_width = shape.kv_heads * shape.head_dim;
    Add(prefix + "q_proj.weight", {q_width, hidden});
    Add(prefix + "k_proj.weight", {kv_width, hidden});
    Add(prefix + "v_proj.weight", {kv_width, hidden});
    Add(prefix + "o_proj.weight", {hidden, q_width});
    Add(prefix + "q_norm.weight", {q_width});
    Add(prefix + "k_norm.weight", {kv_width});
  }

  void Gdn(const std::string& prefix, const GdnShape& shape) {
    const int64_t hidden = spec_.hidden_size;
    Add(prefix + "q_proj.weight", {shape.key_width(), hidden});
    Add(prefix + "k_proj.weight", {shape.key_width(), hidden});
    Add(prefix + "v_proj.weight", {shape.value_width(), hidden});
    Add(prefix + "g_proj.weight", {shape.value_width(), hidden});
    Add(prefix + "a_proj.weight", {shape.value_heads, hidden});
    Add(prefix + "b_proj.weight", {shape.value_heads, hidden});
    Add(prefix + "o_proj.weight", {hidden, shape.value_width()});
    Add(prefix + "A_log", {shape.value_heads});
    Add(prefix + "dt_bias", {shape.value_heads});
    Add(prefix + "o_norm.weight", {shape.value_dim});

    const int64_t channels = shape.conv_channels();
    TensorSpec& conv = Add(prefix + "conv1d.weight", {channels, 1, shape.conv_width});
    conv.parts = {prefix + "q_conv1d.weight", prefix + "k_conv1d.weight", prefix + "v_conv1d.weight"};
    // Cut by what the channels are, as checkpoints converted from OLMo-core have it; or in three equal parts, as
    // transformers' save_pretrained cuts it.
    conv.part_rows = {{shape.key_width(), shape.key_width(), shape.value_width()}};
    const int64_t third = (channels + 2) / 3;
    if (channels - 2 * third > 0) conv.part_rows.push_back({third, third, channels - 2 * third});
  }

  const ModelSpec& spec_;
  std::vector<TensorSpec> tensors_;
};

}  // namespace

std::string LayerPrefix(int64_t layer) {
  return absl::StrCat("model.layers.", layer, ".");
}

std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec) {
  return Builder(spec).Build();
}

bool IsIgnoredTensor(const ModelSpec& spec, std::string_view name) {
  if (name.ends_with("rotary_emb.inv_freq")) return true;
  return spec.model_type == "olmo_hybrid" && name.starts_with("mtp");
}

}  // namespace lockstep

// OLMo Hybrid and OLMo 3, as transformers 5.17 defines them (models/olmo_hybrid, models/olmo3).
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rollout/model/rope_config.h"
#include "rollout/model/spec_fields.h"

namespace lockstep {
namespace {

constexpr char kLinear[] = "linear_attention";
constexpr char kFull[] = "full_attention";
constexpr char kSliding[] = "sliding_attention";

// Initial values of parameters, which a checkpoint replaces.
constexpr std::string_view kOlmoHybridWithoutEffect[] = {"linear_a_log_min", "linear_a_log_max", "linear_dt_min",
                                                         "linear_dt_max", "linear_dt_init_floor"};

std::optional<RopeSpec> MakeRope(ConfigFields& config, const std::optional<RopeParameters>& parameters,
                                 int64_t head_dim) {
  if (!parameters.has_value()) return std::nullopt;
  if (head_dim % 2 != 0) {
    config.Error(config.Has("head_dim") ? "head_dim" : "hidden_size",
                 absl::StrCat("an even head size with RoPE, not ", head_dim));
    return std::nullopt;
  }
  return ComputeRope(*parameters, head_dim);
}

std::vector<std::string> DefaultOlmoHybridLayers(int64_t count) {
  std::vector<std::string> types(count, kLinear);
  for (int64_t i = 3; i < count; i += 4) types[i] = kFull;
  if (count < 4) types.back() = kFull;
  return types;
}

std::vector<std::string> OlmoHybridLayers(ConfigFields& config, int64_t count) {
  std::vector<std::string> types = ParseLayerTypes(config, count);
  if (types.empty()) types = DefaultOlmoHybridLayers(count);
  for (std::string& type : types) {
    // Names from before transformers settled on the two.
    if (type == "mamba" || type == "conv") type = kLinear;
    if (type == "attention") type = kFull;
    if (type != kLinear && type != kFull) {
      config.Error("layer_types",
                   absl::StrCat("only \"", kLinear, "\" and \"", kFull, "\", not \"", type.substr(0, 80), "\""));
      return DefaultOlmoHybridLayers(count);
    }
  }
  return types;
}

GdnShape ParseGdnShape(ConfigFields& config, int64_t hidden_size, int64_t heads) {
  GdnShape shape;
  shape.key_heads = config.Int("linear_num_key_heads", heads, 1, kMaxHeads);
  shape.value_heads = config.Int("linear_num_value_heads", heads, 1, kMaxHeads);
  if (shape.value_heads % shape.key_heads != 0) {
    config.Error("linear_num_value_heads", absl::StrCat("a multiple of linear_num_key_heads, ", shape.key_heads));
  }
  const auto key_dim =
      static_cast<int64_t>(0.75 * static_cast<double>(hidden_size) / static_cast<double>(shape.key_heads));
  shape.key_dim = config.Int("linear_key_head_dim", key_dim, 1, kMaxHeadDim);
  shape.value_dim = config.Int("linear_value_head_dim", 2 * shape.key_dim, 1, kMaxHeadDim);
  if (shape.key_dim < 1 || shape.key_dim > kMaxHeadDim || shape.value_dim > kMaxHeadDim) {
    config.Error("linear_num_key_heads", absl::StrCat("head sizes from 1 to ", kMaxHeadDim, "; the default ones are ",
                                                      shape.key_dim, " and ", shape.value_dim));
  }
  shape.conv_width = config.Int("linear_conv_kernel_dim", 4, 2, 8);
  return shape;
}

}  // namespace

void FillOlmoHybrid(ConfigFields& config, ModelSpec& spec) {
  ParseCommonFields(config, /*default_max_position=*/65536, /*default_norm_eps=*/1e-6, spec);
  config.Ignore(kOlmoHybridWithoutEffect);
  config.Expect("sliding_window", {nullptr}, "none: olmo_hybrid's attention is full");
  const AttentionShape attention = ParseAttentionShape(config, spec.hidden_size);
  const GdnShape gdn = ParseGdnShape(config, spec.hidden_size, attention.heads);
  const bool neg_eigval = config.Bool("linear_allow_neg_eigval", true);

  const int64_t count = config.Int("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  const std::vector<std::string> types = OlmoHybridLayers(config, count);
  const auto full_layers = std::count(types.begin(), types.end(), kFull);
  // transformers refuses a model of linear layers alone, too. Here it is a model like any other.
  if (full_layers == count) config.Error("layer_types", absl::StrCat("at least one \"", kLinear, "\""));

  const std::optional<RopeParameters> parameters = ParseOlmoHybridRope(config, spec.max_position, full_layers > 0);
  if (!config.errors().empty()) return;
  const std::optional<RopeSpec> rope =
      full_layers > 0 ? MakeRope(config, parameters, attention.head_dim) : std::nullopt;
  for (const std::string& type : types) {
    LayerSpec layer;
    if (type == kLinear) {
      layer.mixer = MixerKind::kGatedDeltaNet;
      layer.norm = NormPlacement::kPre;
      layer.gdn = gdn;
      layer.gdn_neg_eigval = neg_eigval;
      layer.gdn_norm_eps = 1e-5f;  // a constant of the architecture, not rms_norm_eps
    } else {
      layer.mixer = MixerKind::kFullAttention;
      layer.norm = NormPlacement::kPost;
      layer.attention = attention;
      layer.rope = rope;
    }
    spec.layers.push_back(std::move(layer));
  }
}

void FillOlmo3(ConfigFields& config, ModelSpec& spec) {
  ParseCommonFields(config, /*default_max_position=*/2048, /*default_norm_eps=*/1e-5, spec);
  const AttentionShape attention = ParseAttentionShape(config, spec.hidden_size);
  const int64_t count = config.Int("num_hidden_layers", std::nullopt, 1, kMaxLayers);

  std::vector<std::string> types = ParseLayerTypes(config, count);
  if (types.empty()) {
    types.assign(count, kSliding);
    for (int64_t i = 3; i < count; i += 4) types[i] = kFull;
  }
  for (const std::string& type : types) {
    if (type == kSliding || type == kFull) continue;
    config.Error("layer_types",
                 absl::StrCat("only \"", kSliding, "\" and \"", kFull, "\", not \"", type.substr(0, 80), "\""));
    break;
  }
  const bool has_sliding = std::find(types.begin(), types.end(), kSliding) != types.end();
  int64_t window = 0;
  if (config.Present("sliding_window") && !config.Has("sliding_window")) {
    if (has_sliding) config.Error("sliding_window", "a number of positions, since layer_types has sliding_attention");
    config.Get("sliding_window");
  } else {
    window = config.Int("sliding_window", 4096, 1, kMaxPosition);
  }

  const Olmo3Rope parameters = ParseOlmo3Rope(config, spec.max_position, has_sliding);
  if (!config.errors().empty()) return;
  const std::optional<RopeSpec> sliding_rope = MakeRope(config, parameters.sliding, attention.head_dim);
  const std::optional<RopeSpec> full_rope = MakeRope(config, parameters.full, attention.head_dim);
  for (const std::string& type : types) {
    LayerSpec layer;
    layer.norm = NormPlacement::kPost;
    layer.attention = attention;
    layer.mixer = type == kSliding ? MixerKind::kSlidingAttention : MixerKind::kFullAttention;
    layer.attention.window = type == kSliding ? window : 0;
    layer.rope = type == kSliding ? sliding_rope : full_rope;
    spec.layers.push_back(std::move(layer));
  }
}

}  // namespace lockstep

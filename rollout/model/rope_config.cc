#include "rollout/model/rope_config.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "spdlog/spdlog.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr double kMaxTheta = 1e18;
constexpr double kMaxFactor = 1e6;
constexpr double kOlmoHybridTheta = 10000;
constexpr double kOlmo3Theta = 500000;

// What a set takes when it does not say itself.
struct RopeDefaults {
  std::optional<double> theta;
  int64_t max_position = 0;
  bool truncate_is_read = false;  // transformers looks for `truncate` beside the layer types, so that a set per layer
                                  // type never sees its own
};

RopeType ParseType(ConfigFields& fields) {
  const std::optional<std::string> type = fields.String("rope_type");
  const std::optional<std::string> legacy = fields.String("type");
  const char* name = type.has_value() ? "rope_type" : "type";
  if (!type.has_value() && fields.Present("rope_type")) fields.Error("rope_type", "a string");
  if (type.has_value() && legacy.has_value() && *type != *legacy)
    fields.Error("type", absl::StrCat("\"", *type, "\", as rope_type says"));
  const std::string value = type.value_or(legacy.value_or("default"));
  if (value == "default") return RopeType::kDefault;
  if (value == "linear") return RopeType::kLinear;
  if (value == "yarn") return RopeType::kYarn;
  fields.Error(name, "\"default\", \"linear\" or \"yarn\"");
  return RopeType::kDefault;
}

void ParseYarn(ConfigFields& fields, const RopeDefaults& defaults, RopeParameters& out) {
  out.original_max_position = defaults.max_position;
  if (fields.Present("original_max_position_embeddings")) {
    out.original_max_position = fields.Int("original_max_position_embeddings", std::nullopt, 1, int64_t{1} << 30);
  }
  // A null factor is the ratio of the two lengths.
  if (!fields.Has("factor") && fields.Present("factor")) {
    out.factor = static_cast<double>(defaults.max_position) / static_cast<double>(out.original_max_position);
  }
  out.attention_factor = fields.Number("attention_factor", 0, kMaxFactor);
  out.mscale = fields.Number("mscale", 0, kMaxFactor);
  out.mscale_all_dim = fields.Number("mscale_all_dim", 0, kMaxFactor);
  out.beta_fast = fields.Number("beta_fast", 0, kMaxFactor).value_or(32);
  out.beta_slow = fields.Number("beta_slow", 0, kMaxFactor).value_or(1);
  if (out.beta_fast < out.beta_slow) fields.Error("beta_fast", absl::StrCat("at least beta_slow, ", out.beta_slow));
  out.truncate = fields.Bool("truncate", true);
  if (!out.truncate && !defaults.truncate_is_read) {
    fields.Error(
        "truncate",
        "true: transformers does not read it from a set of one layer type, so false would not be obeyed there");
  }
}

// One set of parameters. nullopt: its theta is null.
std::optional<RopeParameters> ParseSet(ConfigFields fields, const RopeDefaults& defaults) {
  RopeParameters out;
  out.type = ParseType(fields);
  // The default program ignores this and the others would rotate fewer dimensions than the heads have; only all of them
  // is implemented.
  fields.Expect("partial_rotary_factor", {nullptr, 1}, "1: only whole heads are rotated");

  std::optional<double> theta = defaults.theta;
  if (fields.Present("rope_theta")) theta = fields.Number("rope_theta", 1, kMaxTheta);

  if (out.type != RopeType::kDefault) {
    const std::optional<double> factor = fields.Number("factor", 0, kMaxFactor);
    if (factor.has_value()) out.factor = *factor;
    if (!fields.Present("factor") || (factor.has_value() && *factor < 1) ||
        (out.type == RopeType::kLinear && !fields.Has("factor"))) {
      fields.Error("factor", "a number of at least 1");
    }
  }
  if (out.type == RopeType::kYarn) ParseYarn(fields, defaults, out);
  fields.RefuseUnknown();
  if (!theta.has_value()) return std::nullopt;
  out.theta = *theta;
  return out;
}

// A field that holds a set: nullptr if it is absent, null or {}.
const json* GetSet(ConfigFields& config, const char* name) {
  const json* value = config.Get(name);
  if (value == nullptr) return nullptr;
  if (!value->is_object()) {
    config.Error(name, "an object");
    return nullptr;
  }
  return value->empty() ? nullptr : value;
}

// rope_theta may stand beside a set and inside it. The one inside wins in transformers; two that differ are refused
// here.
void CheckThetaAgrees(ConfigFields& config, const json* set, const char* set_name) {
  if (set == nullptr || !set->contains("rope_theta") || !config.Present("rope_theta")) return;
  const json* outer = config.Get("rope_theta");
  const json& inner = (*set)["rope_theta"];
  if (outer == nullptr ? !inner.is_null() : *outer != inner) {
    config.Error("rope_theta", absl::StrCat(JsonPreview(inner), ", as ", set_name, " says"));
  }
}

}  // namespace

std::optional<RopeParameters> ParseOlmoHybridRope(ConfigFields& config, int64_t max_position, bool has_attention) {
  const json* scaling = GetSet(config, "rope_scaling");
  const json* parameters = GetSet(config, "rope_parameters");
  if (scaling != nullptr && parameters != nullptr) {
    config.Error("rope_scaling", "it to be absent beside rope_parameters");
    return std::nullopt;
  }
  const char* name = scaling != nullptr ? "rope_scaling" : "rope_parameters";
  const json* set = scaling != nullptr ? scaling : parameters;
  CheckThetaAgrees(config, set, name);

  RopeDefaults defaults{.theta = kOlmoHybridTheta, .max_position = max_position, .truncate_is_read = true};
  if (config.Present("rope_theta")) {
    defaults.theta = config.Number("rope_theta", 1, kMaxTheta);
  } else if (has_attention && (set == nullptr || !set->contains("rope_theta"))) {
    spdlog::warn(
        "config.json has no rope_theta, at the top level or in rope_parameters: transformers takes {} then, and so "
        "does this. "
        "NoPE is written as \"rope_theta\": null",
        kOlmoHybridTheta);
  }
  const json empty = json::object();
  return ParseSet(ConfigFields(set == nullptr ? empty : *set, absl::StrCat(name, "."), config.errors()), defaults);
}

Olmo3Rope ParseOlmo3Rope(ConfigFields& config, int64_t max_position, bool has_sliding) {
  const json* scaling = GetSet(config, "rope_scaling");
  const json* parameters = GetSet(config, "rope_parameters");
  Olmo3Rope rope;
  if (scaling != nullptr && parameters != nullptr) {
    config.Error("rope_scaling", "it to be absent beside rope_parameters");
    return rope;
  }
  // The older form scales full attention only. transformers merges it into {"rope_type": "default"}, so that a "type"
  // alone would change nothing.
  if (scaling != nullptr && scaling->contains("type") && !scaling->contains("rope_type")) {
    config.Error("rope_scaling", "rope_type in it: for olmo3 transformers does not read \"type\" here");
  }

  const json empty = json::object();
  const json* full = scaling != nullptr ? scaling : &empty;
  const json* sliding = &empty;
  std::string full_name = "rope_scaling.";
  const std::string sliding_name = "rope_parameters.sliding_attention.";
  if (parameters != nullptr) {
    full_name = "rope_parameters.full_attention.";
    ConfigFields by_type(*parameters, "rope_parameters.", config.errors());
    for (const auto& [key, slot] : {std::pair{"full_attention", &full}, std::pair{"sliding_attention", &sliding}}) {
      if (const json* set = GetSet(by_type, key); set != nullptr) *slot = set;
    }
    by_type.RefuseUnknown();
  }
  CheckThetaAgrees(config, full, full_name.c_str());

  // A top-level rope_theta is full attention's alone: sliding attention keeps the model's default.
  RopeDefaults full_defaults{.theta = kOlmo3Theta, .max_position = max_position};
  RopeDefaults sliding_defaults = full_defaults;
  if (config.Present("rope_theta")) {
    full_defaults.theta = config.Number("rope_theta", 1, kMaxTheta);
    if (!config.Has("rope_theta")) config.Error("rope_theta", "a number: olmo3 has no NoPE");
    if (has_sliding && full_defaults.theta != kOlmo3Theta && !sliding->contains("rope_theta")) {
      spdlog::warn(
          "config.json: transformers gives a top-level rope_theta to the full-attention layers only; the sliding ones "
          "get {}, here too. "
          "rope_parameters says both",
          kOlmo3Theta);
    }
  }
  const auto parse = [&](const json& set, const std::string& name, const RopeDefaults& defaults, RopeParameters& out) {
    const std::optional<RopeParameters> parsed = ParseSet(ConfigFields(set, name, config.errors()), defaults);
    if (parsed.has_value()) {
      out = *parsed;
    } else if (config.errors().empty()) {
      config.errors().Add(name + "rope_theta", "null", "a number: olmo3 has no NoPE");
    }
  };
  parse(*full, full_name, full_defaults, rope.full);
  parse(*sliding, sliding_name, sliding_defaults, rope.sliding);
  return rope;
}

}  // namespace lockstep

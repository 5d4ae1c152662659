#include "rollout/model/spec.h"

#include <algorithm>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "rollout/base/status.h"
#include "rollout/model/mapped_file.h"
#include "rollout/model/name_map.h"
#include "rollout/model/spec_fields.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr char kConfig[] = "config.json";
constexpr char kGenerationConfig[] = "generation_config.json";
constexpr size_t kMaxEosTokens = 1024;

absl::StatusOr<json> ParseObject(std::string_view text, const char* what) {
  LOCKSTEP_ASSIGN_OR_RETURN(json root, ParseStrictJson(text, what));
  if (!root.is_object())
    return absl::InvalidArgumentError(absl::StrCat(what, ": value ", JsonPreview(root), ", want an object"));
  return root;
}

// eos_token_id: an id or a list of ids. Absent or null: empty.
std::vector<int32_t> ParseEos(ConfigFields& config, int64_t vocab_size) {
  const json* value = config.Get("eos_token_id");
  if (value == nullptr) return {};
  const json list = value->is_array() ? *value : json::array({*value});
  const std::string wanted = absl::StrCat("token ids from 0 to ", vocab_size - 1);
  if (list.size() > kMaxEosTokens) {
    config.Error("eos_token_id", absl::StrCat("at most ", kMaxEosTokens, " ids"));
    return {};
  }
  std::vector<int32_t> ids;
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
      config.Error("eos_token_id", wanted);
      return {};
    }
    const auto token = id.get<int32_t>();
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  }
  return ids;
}

}  // namespace

int64_t ModelSpec::parameter_count() const {
  int64_t count = 0;
  for (const TensorSpec& tensor : ExpectedTensors(*this)) {
    if (tensor.tied) continue;
    int64_t elements = 1;
    for (int64_t size : tensor.shape) elements *= size;
    count += elements;
  }
  return count;
}

absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_config_json) {
  LOCKSTEP_ASSIGN_OR_RETURN(const json root, ParseObject(config_json, kConfig));
  ConfigErrors errors(kConfig);
  ConfigFields config(root, "", errors);
  ModelSpec spec;
  spec.model_type = config.String("model_type").value_or("");
  if (spec.model_type == "olmo_hybrid") {
    FillOlmoHybrid(config, spec);
  } else if (spec.model_type == "olmo3") {
    FillOlmo3(config, spec);
  } else {
    if (errors.empty()) config.Error("model_type", "\"olmo_hybrid\" or \"olmo3\"");
    return errors.status();
  }
  spec.eos_token_ids = ParseEos(config, spec.vocab_size);
  config.RefuseUnknown();
  LOCKSTEP_RETURN_IF_ERROR(errors.status());

  if (!generation_config_json.empty()) {
    LOCKSTEP_ASSIGN_OR_RETURN(const json generation_root, ParseObject(generation_config_json, kGenerationConfig));
    ConfigErrors generation_errors(kGenerationConfig);
    // Everything else in this file is a default of transformers' generate(); a request says what it wants itself.
    ConfigFields generation(generation_root, "", generation_errors);
    const std::vector<int32_t> ids = ParseEos(generation, spec.vocab_size);
    LOCKSTEP_RETURN_IF_ERROR(generation_errors.status());
    if (generation.Has("eos_token_id")) spec.eos_token_ids = ids;
  }
  return spec;
}

absl::StatusOr<ModelSpec> LoadModelSpec(const std::filesystem::path& dir) {
  LOCKSTEP_ASSIGN_OR_RETURN(const MappedFile config, MappedFile::Open(dir / kConfig));
  absl::StatusOr<ModelSpec> spec;
  std::error_code error;
  if (std::filesystem::exists(dir / kGenerationConfig, error)) {
    LOCKSTEP_ASSIGN_OR_RETURN(const MappedFile generation, MappedFile::Open(dir / kGenerationConfig));
    // Nothing at all is "no file" to ParseModelSpec, and not JSON.
    spec = ParseModelSpec(config.text(), generation.size() == 0 ? " " : generation.text());
  } else {
    spec = ParseModelSpec(config.text(), "");
  }
  if (spec.ok()) return spec;
  return absl::Status(spec.status().code(), absl::StrCat(dir.string(), ": ", spec.status().message()));
}

}  // namespace lockstep

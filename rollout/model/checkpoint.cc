#include "rollout/model/checkpoint.h"

#include <set>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "rollout/base/status.h"
#include "rollout/model/strict_json.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

bool IsPlainSafetensorsName(std::string_view name) {
  constexpr std::string_view kSuffix = ".safetensors";
  return name.size() > kSuffix.size() && name.ends_with(kSuffix) && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

}  // namespace

absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(std::string_view text, std::string_view what) {
  const std::string where(what);
  LOCKSTEP_ASSIGN_OR_RETURN(const json root, ParseStrictJson(text, what));
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": want an object with weight_map {tensor: file}"));
  }
  std::map<std::string, std::string> weight_map;
  for (const auto& [tensor, file] : root["weight_map"].items()) {
    if (!file.is_string() || !IsPlainSafetensorsName(file.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": weight_map: tensor \"", tensor, "\": value ", JsonPreview(file),
                       ", want the plain name of a .safetensors file in the same folder"));
    }
    weight_map.emplace(tensor, file.get<std::string>());
  }
  if (weight_map.empty()) return absl::InvalidArgumentError(absl::StrCat(where, ": weight_map is empty"));
  return weight_map;
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::filesystem::path& dir) {
  std::error_code error;
  const bool has_index = std::filesystem::exists(dir / kIndexFile, error);
  const bool has_single = std::filesystem::exists(dir / kSingleFile, error);
  Checkpoint checkpoint;
  if (!has_index) {
    if (!has_single) {
      return absl::NotFoundError(absl::StrCat(dir.string(), ": has neither ", kSingleFile, " nor ", kIndexFile));
    }
    LOCKSTEP_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(dir / kSingleFile));
    checkpoint.files_.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
    const SafetensorsFile* kept = checkpoint.files_.back().get();
    for (const TensorEntry& entry : kept->tensors()) checkpoint.tensors_[entry.name] = {kept, &entry};
    return checkpoint;
  }

  const std::string index_path = (dir / kIndexFile).string();
  LOCKSTEP_ASSIGN_OR_RETURN(const MappedFile index_file, MappedFile::Open(dir / kIndexFile));
  LOCKSTEP_ASSIGN_OR_RETURN(const auto weight_map, ParseSafetensorsIndex(index_file.text(), index_path));
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weight_map) shards.insert(shard);
  if (has_single && !shards.contains(kSingleFile)) {
    return absl::InvalidArgumentError(absl::StrCat(dir.string(), ": has both ", kSingleFile, " and ", kIndexFile,
                                                   ", which does not name it; remove the one that is not the model"));
  }
  for (const std::string& shard : shards) {
    LOCKSTEP_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(dir / shard));
    checkpoint.files_.push_back(std::make_unique<SafetensorsFile>(std::move(opened)));
    const SafetensorsFile* file = checkpoint.files_.back().get();
    for (const TensorEntry& entry : file->tensors()) {
      const auto listed = weight_map.find(entry.name);
      if (listed == weight_map.end() || listed->second != shard) {
        return absl::InvalidArgumentError(
            absl::StrCat(file->path().string(), ": holds tensor \"", entry.name, "\", which ", index_path,
                         listed == weight_map.end() ? " does not list" : " lists in " + listed->second));
      }
      checkpoint.tensors_[entry.name] = {file, &entry};
    }
  }
  for (const auto& [tensor, shard] : weight_map) {
    if (!checkpoint.tensors_.contains(tensor)) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": lists tensor \"", tensor, "\" in ", shard, ", which does not hold it"));
    }
  }
  return checkpoint;
}

const CheckpointTensor* Checkpoint::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace lockstep

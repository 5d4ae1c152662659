// All tensors of a Hugging Face directory: model.safetensors, or the shards that model.safetensors.index.json names.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "rollout/model/safetensors.h"

namespace lockstep {

struct CheckpointTensor {
  const SafetensorsFile* file = nullptr;
  const TensorEntry* entry = nullptr;

  const std::byte* data() const { return file->Data(*entry); }
  void Drop() const { file->Drop(*entry); }
};

// The index's weight_map: tensor name -> file name. File names must be plain names (no folders) that end in
// .safetensors.
absl::StatusOr<std::map<std::string, std::string>> ParseSafetensorsIndex(std::string_view text, std::string_view what);

class Checkpoint {
 public:
  // With an index, the shards must hold exactly the tensors it lists, each in the shard it says.
  static absl::StatusOr<Checkpoint> Open(const std::filesystem::path& dir);

  // By name. Pointers live as long as the Checkpoint.
  const std::map<std::string, CheckpointTensor>& tensors() const { return tensors_; }
  const CheckpointTensor* Find(const std::string& name) const;

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, CheckpointTensor> tensors_;
};

}  // namespace lockstep

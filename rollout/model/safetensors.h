// One safetensors file, memory-mapped and strictly checked: an 8-byte little-endian header length, a JSON header, then
// the tensors' bytes. https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/numerics.h"
#include "rollout/model/mapped_file.h"

namespace lockstep {

// The reference implementation's limit.
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;

struct TensorEntry {
  std::string name;
  std::string dtype_name;      // as the file says: "BF16"
  std::optional<DType> dtype;  // nullopt: a type of the format that no model here is stored in (I64, F8_E4M3, ...)
  std::vector<int64_t> shape;  // empty: a scalar; a dimension may be 0
  int64_t elements = 0;
  uint64_t begin = 0;  // bytes from the start of the file
  uint64_t end = 0;

  uint64_t bytes() const { return end - begin; }
  bool operator==(const TensorEntry&) const = default;
};

// Checks everything the format promises: header length, JSON (no duplicate key, only the known ones), known dtypes,
// sizes that match shapes, and tensors that cover the data section without overlap or hole. `file` holds at least the
// header, `file_size` is the whole file's. Sorted by place in the file. INVALID_ARGUMENT "<what>: ..." names the
// tensor, the value seen and the value wanted.
absl::StatusOr<std::vector<TensorEntry>> ParseSafetensorsHeader(std::string_view file, uint64_t file_size,
                                                                std::string_view what);

class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> Open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  const TensorEntry* Find(const std::string& name) const;

  // The bytes of a tensor of this file: little-endian, row-major, aligned as the file happens to be.
  const std::byte* Data(const TensorEntry& tensor) const { return file_.data() + tensor.begin; }
  // The tensor will not be read again soon: its pages may go.
  void Drop(const TensorEntry& tensor) const { file_.Drop(tensor.begin, tensor.bytes()); }

 private:
  SafetensorsFile(std::filesystem::path path, MappedFile file, std::vector<TensorEntry> tensors);

  std::filesystem::path path_;
  MappedFile file_;
  std::vector<TensorEntry> tensors_;
  std::unordered_map<std::string, size_t> index_;  // name -> place in tensors_
};

}  // namespace lockstep

// libFuzzer: any bytes as a safetensors file, or, if they begin with '{', as a shard index. What passes must be
// consistent with the file it came from.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "rollout/base/check.h"
#include "rollout/model/checkpoint.h"
#include "rollout/model/safetensors.h"

namespace {

void CheckEntries(const std::vector<lockstep::TensorEntry>& tensors, uint64_t file_size) {
  uint64_t covered = 0;
  for (const lockstep::TensorEntry& tensor : tensors) {
    LOCKSTEP_CHECK(tensor.begin <= tensor.end && tensor.end <= file_size, "bounds of {}", tensor.name);
    covered += tensor.bytes();
    if (!tensor.dtype.has_value()) continue;
    LOCKSTEP_CHECK(tensor.bytes() == static_cast<uint64_t>(tensor.elements) * lockstep::DTypeBytes(*tensor.dtype),
                   "size of {}", tensor.name);
    int64_t elements = 1;
    for (int64_t n : tensor.shape) elements = n == 0 ? 0 : elements * n;
    LOCKSTEP_CHECK(tensor.elements == elements, "elements of {}", tensor.name);
  }
  LOCKSTEP_CHECK(tensors.empty() || tensors.front().begin + covered == file_size, "{} bytes covered of {}", covered,
                 file_size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (bytes.starts_with('{')) {
    if (const auto index = lockstep::ParseSafetensorsIndex(bytes, "fuzz"); index.ok()) {
      for (const auto& [tensor, file] : *index) LOCKSTEP_CHECK(file.find('/') == std::string::npos, "{}", file);
    }
    return 0;
  }
  if (const auto tensors = lockstep::ParseSafetensorsHeader(bytes, size, "fuzz"); tensors.ok())
    CheckEntries(*tensors, size);
  return 0;
}

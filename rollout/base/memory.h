// Memory for sequences: KV pages and state slots in two anonymous mappings. Pages of the mapping that no sequence has
// touched cost nothing, so a pool may be as large as its budget without being resident.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"

namespace lockstep {

// A zeroed, page-aligned anonymous mapping.
class Arena {
 public:
  static absl::StatusOr<Arena> Map(int64_t bytes);
  Arena() = default;
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Bytes of memory this process may still take: MemAvailable, or what is left of a cgroup's limit if that is less.
int64_t AvailableMemory();

}  // namespace lockstep

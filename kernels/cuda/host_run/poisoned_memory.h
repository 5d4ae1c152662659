// Memory as a GPU's allocator aligns it, all NaN: what kernels on a CPU read without having written it shows.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace lockstep::host_run {

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

inline Memory Allocate(size_t bytes) {
  Memory memory(static_cast<std::byte*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)));
  std::memset(memory.get(), 0xFF, bytes);
  return memory;
}

}  // namespace lockstep::host_run

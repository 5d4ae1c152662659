// Owned memory, 64-byte aligned. Large buffers ask for huge pages: streaming gigabytes of weights through 4 KiB pages
// costs bandwidth in TLB misses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rollout/base/check.h"

namespace lockstep {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes) : bytes_(bytes) {
    constexpr int64_t kHugePage = int64_t{2} << 20;
    const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
    if (bytes == 0) return;
    void* data = nullptr;
    LOCKSTEP_CHECK(posix_memalign(&data, alignment, bytes) == 0, "cannot allocate {} bytes", bytes);
    data_.reset(static_cast<std::byte*>(data));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // A hint; kernels without transparent huge pages refuse it and everything still works. What does not fill a huge
    // page stays on small ones: a model has a hundred matrices, and a megabyte lost at the end of each adds up.
    if (alignment == kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }

  std::byte* data() const {
    return data_.get();
  }
  int64_t bytes() const {
    return bytes_;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  int64_t bytes_ = 0;
};

}  // namespace lockstep

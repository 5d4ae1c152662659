#include "rollout/base/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// A file holding one number, or "max" (cgroup v2's word for no limit).
int64_t ReadNumber(const char* path) {
  std::ifstream in(path);
  int64_t value = 0;
  return in >> value ? value : kUnlimited;
}

}  // namespace

absl::StatusOr<Arena> Arena::Map(int64_t bytes) {
  Arena arena;
  if (bytes == 0) return arena;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return absl::ResourceExhaustedError(absl::StrCat("cannot map ", bytes, " bytes: ", std::strerror(errno)));
  // Decode streams through states of tens of kilobytes; huge pages save most of its TLB misses. Only a hint.
  madvise(p, bytes, MADV_HUGEPAGE);
  arena.data_ = static_cast<std::byte*>(p);
  arena.bytes_ = bytes;
  return arena;
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

int64_t AvailableMemory() {
  int64_t available = kUnlimited;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) available = std::stoll(line.substr(13)) * 1024;
  }
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (limit != kUnlimited && used != kUnlimited) available = std::min(available, std::max<int64_t>(limit - used, 0));
  return available;
}

}  // namespace lockstep

// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

#include "absl/status/statusor.h"

namespace lockstep {

class MappedFile {
 public:
  // Regular files only. NOT_FOUND and the other codes errno stands for name the path. The file must not be truncated
  // while it is mapped (reading past its new end would be SIGBUS); replacing it by rename is safe.
  static absl::StatusOr<MappedFile> Open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  // Gives the pages that hold [offset, offset + length) back to the kernel; reading them again faults them in again.
  void Drop(uint64_t offset, uint64_t length) const;

 private:
  MappedFile(const std::byte* data, uint64_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;  // nullptr: an empty file
  uint64_t size_ = 0;
};

}  // namespace lockstep

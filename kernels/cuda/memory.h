// Device and pinned host memory, owned.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

// absl::InternalError("WHAT: the runtime's words"), or OkStatus.
absl::Status CudaStatus(cudaError_t error, const char* what);

class CudaMemory final : public DeviceMemory {
 public:
  // cudaMalloc. RESOURCE_EXHAUSTED says what was wanted and what is free. 0 bytes are a null pointer.
  static absl::StatusOr<std::unique_ptr<CudaMemory>> Allocate(int64_t bytes);
  static absl::StatusOr<std::unique_ptr<CudaMemory>> AllocateZeroed(int64_t bytes);
  ~CudaMemory() override;
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  std::byte* data() const override { return data_; }
  int64_t bytes() const override { return bytes_; }

 private:
  CudaMemory(std::byte* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* const data_;
  const int64_t bytes_;
};

// Page-locked host memory: what asynchronous copies need.
class PinnedMemory {
 public:
  static absl::StatusOr<PinnedMemory> Allocate(int64_t bytes);
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedMemory();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace lockstep::cuda

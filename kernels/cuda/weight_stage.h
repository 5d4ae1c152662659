// Device memory for new weights beside those in use, filled through page-locked buffers on a stream of its own: the
// step loop's stream goes on.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <span>

#include "kernels/cuda/memory.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

class CudaWeightStage final : public WeightStage {
 public:
  // On the current device, which is made current again by every call. RESOURCE_EXHAUSTED if there is not the memory.
  static absl::StatusOr<std::unique_ptr<CudaWeightStage>> Create(int64_t bytes);
  ~CudaWeightStage() override;

  int64_t bytes() const override { return memory_->bytes(); }
  absl::Status Write(int64_t offset, std::span<const std::byte> data) override;
  absl::Status Finish() override;
  const std::byte* data() const override { return memory_->data(); }
  std::byte* data() override { return memory_->data(); }

 private:
  CudaWeightStage() = default;
  // One of two, in turn: one is filled while the other is copied.
  struct Buffer {
    PinnedMemory memory;
    cudaEvent_t copied = nullptr;
  };
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  Buffer buffers_[2];
  int turn_ = 0;
  std::unique_ptr<CudaMemory> memory_;
};

}  // namespace lockstep::cuda

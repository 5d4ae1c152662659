// Where new weights go, filled through page-locked buffers on a stream of its own: room in device memory beside the
// weights in use, the step loop's stream going on; or the weights in use themselves.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <span>
#include <vector>

#include "kernels/cuda/memory.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

// A run of device memory by the offset that names its first byte.
struct StageRegion {
  int64_t offset = 0;
  int64_t bytes = 0;
  std::byte* data = nullptr;
};

class CudaWeightStage final : public LiveWeights {
 public:
  // Both on the current device, which is made current again by every call.
  // Room of its own. RESOURCE_EXHAUSTED if there is not the memory.
  static absl::StatusOr<std::unique_ptr<CudaWeightStage>> Create(int64_t bytes);
  // Memory in use, in ascending order of offset, that must outlive it.
  static absl::StatusOr<std::unique_ptr<CudaWeightStage>> CreateLive(std::vector<StageRegion> regions);
  ~CudaWeightStage() override;

  int64_t bytes() const override;
  absl::Status Write(int64_t offset, std::span<const std::byte> data) override;
  absl::Status Finish() override;
  std::byte* Address(int64_t offset, int64_t bytes) override;
  absl::Status Read(int64_t offset, std::span<std::byte> to) override;
  absl::StatusOr<uint64_t> SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) override;

 private:
  CudaWeightStage() = default;
  // One of two, in turn: the host works on one while the other is copied.
  struct Buffer {
    PinnedMemory memory;
    cudaEvent_t copied = nullptr;
  };
  // A stream and its buffers; a way is used by one thread at a time.
  struct Way {
    cudaStream_t stream = nullptr;
    Buffer buffers[2];
    int turn = 0;
  };
  static absl::Status Open(Way& way);
  absl::Status Init();

  int device_ = 0;
  Way up_, down_;
  std::unique_ptr<CudaMemory> memory_;  // of its own; null: the weights in use
  std::unique_ptr<CudaMemory> tally_;   // of the weights in use: one ValueTally
  std::vector<StageRegion> regions_;
};

}  // namespace lockstep::cuda

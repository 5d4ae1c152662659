// A WeightInbox in device memory: the transport's stream, a stream of its own that converts and counts, and events
// between them. The host waits for neither.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "kernels/cuda/memory.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

class CudaWeightInbox final : public WeightInbox {
 public:
  // On the current device. RESOURCE_EXHAUSTED if there is not the memory.
  static absl::StatusOr<std::unique_ptr<CudaWeightInbox>> Create(int64_t buffer_bytes, int64_t tallies);
  ~CudaWeightInbox() override;

  int64_t buffer_bytes() const override { return buffer_bytes_; }
  std::byte* buffer(int which) override { return buffers_->data() + which * buffer_bytes_; }
  void* stream() override { return transport_; }
  absl::Status UseOnThisThread() override;
  absl::Status Reset() override;
  absl::Status Acquire(int which) override;
  absl::Status Arrived() override;
  absl::Status Store(const InboxValues& values, WeightStage& stage) override;
  absl::Status Release(int which) override;
  absl::StatusOr<bool> Idle() override;
  absl::StatusOr<std::vector<ValueTally>> Tallies() override;

 private:
  CudaWeightInbox(int64_t buffer_bytes, int64_t tallies) : buffer_bytes_(buffer_bytes), tally_count_(tallies) {}
  const int64_t buffer_bytes_;
  const int64_t tally_count_;
  int device_ = 0;
  std::unique_ptr<CudaMemory> buffers_;
  std::unique_ptr<CudaMemory> tallies_;
  cudaStream_t transport_ = nullptr;
  cudaStream_t convert_ = nullptr;
  cudaEvent_t arrived_ = nullptr;
  cudaEvent_t released_[2] = {};
};

}  // namespace lockstep::cuda

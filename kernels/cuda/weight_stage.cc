#include "kernels/cuda/weight_stage.h"

#include <algorithm>
#include <cstring>

#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kBufferBytes = int64_t{32} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<CudaWeightStage>> CudaWeightStage::Create(int64_t bytes) {
  std::unique_ptr<CudaWeightStage> stage(new CudaWeightStage);
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&stage->device_), "cudaGetDevice"));
  LOCKSTEP_ASSIGN_OR_RETURN(stage->memory_, CudaMemory::Allocate(bytes));
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithFlags(&stage->stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
  for (Buffer& buffer : stage->buffers_) {
    LOCKSTEP_ASSIGN_OR_RETURN(buffer.memory, PinnedMemory::Allocate(kBufferBytes));
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  }
  return stage;
}

CudaWeightStage::~CudaWeightStage() {
  if (stream_ == nullptr) return;
  cudaStreamSynchronize(stream_);
  for (Buffer& buffer : buffers_) {
    if (buffer.copied != nullptr) cudaEventDestroy(buffer.copied);
  }
  cudaStreamDestroy(stream_);
}

absl::Status CudaWeightStage::Write(int64_t offset, std::span<const std::byte> data) {
  const int64_t size = static_cast<int64_t>(data.size());
  LOCKSTEP_CHECK(offset >= 0 && size <= bytes() - offset, "{} bytes at {} of {}", size, offset, bytes());
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  for (int64_t done = 0; done < size; turn_ ^= 1) {
    Buffer& buffer = buffers_[turn_];
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(buffer.copied), "weights to the device"));
    const int64_t count = std::min(kBufferBytes, size - done);
    std::memcpy(buffer.memory.data(), data.data() + done, count);
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(memory_->data() + offset + done, buffer.memory.data(), count, cudaMemcpyHostToDevice, stream_),
        "weights to the device"));
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventRecord(buffer.copied, stream_), "weights to the device"));
    done += count;
  }
  return absl::OkStatus();
}

absl::Status CudaWeightStage::Finish() {
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  return CudaStatus(cudaStreamSynchronize(stream_), "weights to the device");
}

}  // namespace lockstep::cuda

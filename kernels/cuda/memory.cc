#include "kernels/cuda/memory.h"

#include "absl/strings/str_cat.h"

namespace lockstep::cuda {

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

absl::StatusOr<std::unique_ptr<CudaMemory>> CudaMemory::Allocate(int64_t bytes) {
  void* data = nullptr;
  if (bytes > 0) {
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: the device goes on
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      return absl::ResourceExhaustedError(
          absl::StrCat("device memory: ", bytes, " bytes wanted, ", free, " of ", total, " free"));
    }
    if (error != cudaSuccess) return CudaStatus(error, "cudaMalloc");
  }
  return std::unique_ptr<CudaMemory>(new CudaMemory(static_cast<std::byte*>(data), bytes));
}

absl::StatusOr<std::unique_ptr<CudaMemory>> CudaMemory::AllocateZeroed(int64_t bytes) {
  absl::StatusOr<std::unique_ptr<CudaMemory>> memory = Allocate(bytes);
  if (!memory.ok() || bytes == 0) return memory;
  if (cudaError_t error = cudaMemset((*memory)->data(), 0, bytes); error != cudaSuccess) {
    return CudaStatus(error, "cudaMemset");
  }
  // The host does not wait for cudaMemset, and nor does a stream that does not block the default one: without this the
  // zeros could come after the first values.
  if (cudaError_t error = cudaStreamSynchronize(cudaStreamLegacy); error != cudaSuccess) {
    return CudaStatus(error, "cudaMemset");
  }
  return memory;
}

CudaMemory::~CudaMemory() {
  cudaFree(data_);
}

absl::StatusOr<PinnedMemory> PinnedMemory::Allocate(int64_t bytes) {
  PinnedMemory memory;
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(
        absl::StrCat("page-locked memory: ", bytes, " bytes wanted: ", cudaGetErrorString(error)));
  }
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  return memory;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

}  // namespace lockstep::cuda

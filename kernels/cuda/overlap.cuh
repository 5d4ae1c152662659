// How kernels follow one another without a launch's latency between them: each may start before the stream's previous
// kernel has ended, and waits for that one's end before it touches memory. So the order is a stream's as ever, whatever
// kernels stand before and after.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {

// Of a kernel launched kOverlapped: lets the next kernel start, which waits in turn.
__device__ __forceinline__ void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits for the previous kernel's results. In every block, even one with nothing to do: the next kernel waits for this
// one's end, and must not see it before the previous one's.
__device__ __forceinline__ void AwaitPreviousKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The first statement of a kernel launched kOverlapped that has nothing to do before the previous one's end.
__device__ __forceinline__ void FollowPreviousKernel() {
  LetNextKernelStart();
  AwaitPreviousKernel();
}

enum class LaunchOrder {
  kOverlapped,
  kAfter,  // starts when the previous kernel has left the device: blocks spread over all of it
};

// shared_bytes: dynamic.
template <class... Parameters, class... Arguments>
absl::Status LaunchKernel(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                          size_t shared_bytes, LaunchOrder order, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = order == LaunchOrder::kOverlapped ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(name, ": ", cudaGetErrorString(error)));
}

// Of the row-wise kernels, which have no dynamic shared memory.
template <class... Parameters, class... Arguments>
absl::Status LaunchOverlapped(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                              cudaStream_t stream, const Arguments&... arguments) {
  return LaunchKernel(name, kernel, blocks, threads, 0, LaunchOrder::kOverlapped, stream, arguments...);
}

}  // namespace lockstep::cuda

// Launches a kernel with its dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {

enum class LaunchOrder {
  kOverlapped,  // follows the stream's previous kernel closely (overlap.cuh)
  kAfter,       // starts when the previous kernel has left the device: blocks spread over all of it
};

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
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(name, ": ", cudaGetErrorString(error)));
}

}  // namespace lockstep::cuda

// How the row-wise kernels follow one another without a launch's latency between them: each may start before the
// stream's previous kernel has ended, and waits for that one's end before it touches memory. So the order is a stream's
// as ever, whatever kernels stand before and after.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {

// The first statement of a kernel launched by LaunchOverlapped: lets the next kernel start (it waits in turn), then
// waits for the previous one's results.
__device__ __forceinline__ void FollowPreviousKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

template <class... Parameters, class... Arguments>
absl::Status LaunchOverlapped(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                              cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(name, ": ", cudaGetErrorString(error)));
}

}  // namespace lockstep::cuda

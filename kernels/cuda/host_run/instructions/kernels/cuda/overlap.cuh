// kernels/cuda/overlap.cuh on a CPU: a launch runs the whole grid.
#pragma once

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {

inline void LetNextKernelStart() {}
inline void AwaitPreviousKernel() {}
inline void FollowPreviousKernel() {}

enum class LaunchOrder { kOverlapped, kAfter };

// static: `raw` is another one in every file.
template <class... Parameters, class... Arguments>
static absl::Status LaunchKernel(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                                 size_t shared_bytes, LaunchOrder, cudaStream_t, const Arguments&... arguments) {
  if (shared_bytes > sizeof(raw)) return BadField(name, shared_bytes, "shared memory that a multiprocessor has");
  host_run::RunGrid(name, blocks, threads, {raw, shared_bytes}, [&] { kernel(arguments...); });
  return absl::OkStatus();
}

template <class... Parameters, class... Arguments>
static absl::Status LaunchOverlapped(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                                     cudaStream_t stream, const Arguments&... arguments) {
  return LaunchKernel(name, kernel, blocks, threads, 0, LaunchOrder::kOverlapped, stream, arguments...);
}

}  // namespace lockstep::cuda

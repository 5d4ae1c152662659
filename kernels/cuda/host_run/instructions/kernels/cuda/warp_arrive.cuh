// kernels/cuda/warp_arrive.cuh on a CPU.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

inline constexpr int kWarpArrivals = 1;

inline void WarpArrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) host_run::Arrive(barrier, 0);
}

}  // namespace lockstep::cuda

// The blocks that share one task: kBlocks of them, a thread block cluster. Device code.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace lockstep::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlockThreads = 1024;
inline constexpr int kBlockWarps = kBlockThreads / kWarp;
inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

template <int kBlocks>
struct TaskCluster {
  __device__ static int rank() {
    if constexpr (kBlocks == 1) return 0;
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }

  // A barrier over all threads of the cluster; what was written before it, shared memory of any block included, is seen
  // after it.
  __device__ static void Sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      cooperative_groups::this_cluster().sync();
    }
  }

  // The same variable of another block's shared memory.
  template <class T>
  __device__ static T* Of(int block, T* shared) {
    if constexpr (kBlocks == 1) return shared;
    return cooperative_groups::this_cluster().map_shared_rank(shared, block);
  }
};

__device__ inline int Lane() {
  return static_cast<int>(threadIdx.x % kWarp);
}

__device__ inline int WarpIndex() {
  return static_cast<int>(threadIdx.x / kWarp);
}

__device__ inline float WarpMax(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, distance));
  }
  return v;
}

// Sum over the lanes up to and including this one.
__device__ inline uint64_t WarpPrefixSum(uint64_t v) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, v, distance);
    if (Lane() >= distance) v += below;
  }
  return v;
}

}  // namespace lockstep::cuda

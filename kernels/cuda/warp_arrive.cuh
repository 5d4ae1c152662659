// A warp's arrival at an mbarrier.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

// compute-sanitizer's racecheck takes only the arriving threads' accesses as ordered, and reports a race in any ring
// whose warps elect one lane after __syncwarp(). Built with LOCKSTEP_RACECHECK every lane arrives, so that racecheck
// can tell whether there are others; slower.
#if defined(LOCKSTEP_RACECHECK)
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif

// Of all lanes together: what each has read and written before is ordered before the barrier's phase ends. The barrier
// counts kWarpArrivals for each warp.
__device__ inline void WarpArrive(uint64_t* barrier) {
  if constexpr (kWarpArrivals == 1) __syncwarp();
  if (kWarpArrivals > 1 || threadIdx.x % 32 == 0) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }
}

}  // namespace lockstep::cuda

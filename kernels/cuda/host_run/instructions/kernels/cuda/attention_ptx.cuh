// The instructions of kernels/cuda/attention_ptx.cuh on a CPU.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace lockstep::cuda {

inline void BarrierArrive(uint64_t* barrier) {
  host_run::Arrive(barrier, 0);
}
inline void NamedBarrier(int id, int threads) {
  host_run::BlockBarrier(id, threads);
}
inline void ProxyFence() {}

inline float Reciprocal(float x) {
  return oracle::ReciprocalApprox(x);
}

inline uint32_t PackBf16(float low, float high) {
  return static_cast<uint32_t>(F32ToBf16(low)) | static_cast<uint32_t>(F32ToBf16(high)) << 16;
}

inline uint32_t Swizzled128(int row, int chunk) {
  return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
}

inline uint32_t Swizzled64(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ (row >> 1 & 3)) << 4));
}

}  // namespace lockstep::cuda

// The instructions of kernels/cuda/gdn_ptx.cuh on a CPU.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/ptx.cuh"

namespace lockstep::cuda::gdn {

inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma16(d, a, b0, b1);
}
inline void MmaTf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  uint32_t words[4];
  std::memcpy(words, a, sizeof(words));
  MmaStep<1>("mma of tf32", d, words, std::bit_cast<uint32_t>(b0), std::bit_cast<uint32_t>(b1), oracle::MakeTf32Factor);
}

}  // namespace lockstep::cuda::gdn

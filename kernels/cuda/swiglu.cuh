// SwiGLU's arithmetic, for every kernel that ends in it.
#pragma once

#include "kernels/cuda/bf16_rows.cuh"

namespace lockstep::cuda {

// round(round(silu(gate)) * up)
template <int kCount>
__device__ __forceinline__ Bf16s<kCount> SwiGlu(const Bf16s<kCount>& gate, const Bf16s<kCount>& up) {
  Floats<kCount> out = Unpack(gate);
#pragma unroll
  for (int k = 0; k < kCount; ++k) out.v[k] = SiluOfBf16(out.v[k]);
  out = RoundBf16(out);
  const Floats<kCount> factor = Unpack(up);
#pragma unroll
  for (int k = 0; k < kCount; ++k) out.v[k] = __fmul_rn(out.v[k], factor.v[k]);
  return Pack(out);
}

}  // namespace lockstep::cuda

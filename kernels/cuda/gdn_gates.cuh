// Device code of the gates: a kernel of their own (gdn_gates.cu) and blocks of the convolution's (gdn_conv.cu).
#pragma once

#include <cstdint>

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/gdn_gates.h"

namespace lockstep::cuda {

// Element `index` of [rows, heads]; one past the end is nothing.
__device__ __forceinline__ void GdnGate(const GdnGatesParams& params, unsigned index) {
  const auto heads = static_cast<unsigned>(params.heads);
  const int64_t row = index / heads;
  if (row >= params.rows) return;
  const int64_t head = index % heads;
  // All loads before the first store, which the compiler may not move them over: one wait for memory.
  const float b = __bfloat162float(params.b[row * params.b_stride + head]);
  const float a = __bfloat162float(params.a[row * params.a_stride + head]);
  const float a_log = params.a_log[head];
  const float dt_bias = params.dt_bias[head];
  float beta = __bfloat162float(__float2bfloat16_rn(Sigmoid(b)));
  if (params.neg_eigval) beta = __fadd_rn(beta, beta);
  params.beta[row * params.beta_stride + head] = __float2bfloat16_rn(beta);
  params.g[row * params.g_stride + head] = __fmul_rn(-expf(a_log), Softplus(__fadd_rn(a, dt_bias)));
}

}  // namespace lockstep::cuda

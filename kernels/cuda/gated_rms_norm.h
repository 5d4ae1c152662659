// RMSNorm per head times SiLU of a gate: the output norm of Gated DeltaNet, bit for bit as transformers or
// flash-linear-attention compute it on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// Per head of head_dim columns, n(x) = x / sqrt(mean(x^2) + eps):
//   kThree: out = round(round(weight * round(n(x))) * silu(gate)): transformers' module, what it runs with fla
//   installed kTwo:   out = round(weight * round(n(x)) * silu(gate)): the same module with an fp32 weight, as under
//   autocast kOne:   out = round(n(x) * weight * gate * sigmoid(gate)): fla's fused norm, transformers' with hub
//   kernels
// fp32 inside. Strides in elements.
struct GatedRmsNormParams {
  const __nv_bfloat16* x = nullptr;     // [rows, heads * head_dim]
  const __nv_bfloat16* gate = nullptr;  // [rows, heads * head_dim]
  const void* weight = nullptr;         // [head_dim], fp32 with kTwo, else bf16
  __nv_bfloat16* out = nullptr;         // [rows, heads * head_dim], may be x
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;  // 128, 192 or 256
  int64_t x_stride = 0;
  int64_t gate_stride = 0;
  int64_t out_stride = 0;
  float eps = 0;
  GatedNormCasts casts = GatedNormCasts::kThree;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchGatedRmsNorm(const GatedRmsNormParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

// SwiGLU in bf16, bit for bit as PyTorch computes F.silu(gate) * up on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// out = round(round(silu(gate)) * up), fp32 inside. Strides in elements.
struct SwiGluParams {
  const __nv_bfloat16* gate_up = nullptr;  // [rows, 2 * width], gate in the first half
  __nv_bfloat16* out = nullptr;            // [rows, width]; must not overlap gate_up
  int64_t rows = 0;
  int64_t width = 0;
  int64_t gate_up_stride = 0;
  int64_t out_stride = 0;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

// The gates of Gated DeltaNet, bit for bit as transformers computes them on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// beta = round(sigmoid(b)), doubled if neg_eigval; g = -exp(a_log) * softplus(a + dt_bias) in fp32. Strides in
// elements.
struct GdnGatesParams {
  const __nv_bfloat16* a = nullptr;  // [rows, heads]
  const __nv_bfloat16* b = nullptr;  // [rows, heads]
  const float* a_log = nullptr;      // [heads]
  const float* dt_bias = nullptr;    // [heads]
  __nv_bfloat16* beta = nullptr;     // [rows, heads]
  float* g = nullptr;                // [rows, heads]
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t a_stride = 0;
  int64_t b_stride = 0;
  int64_t beta_stride = 0;
  int64_t g_stride = 0;
  bool neg_eigval = false;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchGdnGates(const GdnGatesParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

// Rotary position embedding in bf16, bit for bit as transformers' Olmo 3 and Olmo Hybrid compute it on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/batch.h"

namespace lockstep::cuda {

// Rotates pairs (i, i + 64) of every head of q and k in place. The angle is the fp32 product position * inv_freq[i];
// cos and sin are fp32 and multiplied by attention_scaling; the two products and their sum round to fp32 one by one,
// the result to bf16. Strides in elements.
struct RopeParams {
  DeviceBatch batch;                // rows, positions, row_piece; padding rows are skipped
  __nv_bfloat16* q = nullptr;       // [rows, heads * 128]
  __nv_bfloat16* k = nullptr;       // [rows, kv_heads * 128]
  const float* inv_freq = nullptr;  // [64]
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  float attention_scaling = 1.0f;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchRope(const RopeParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

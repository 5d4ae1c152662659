// RMSNorm in bf16, alone or with the residual addition before or after it, bit for bit as PyTorch computes it on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

enum class RmsNormFusion {
  kNone,          // out = norm(x)
  kAddBefore,     // residual = round(residual + x); out = norm(residual)
  kAddAfter,      // residual = round(residual + norm(x))
  kAddAfterNorm,  // residual = round(residual + norm(x)); out = norm(residual) with out_weight
};

// norm(x) = round(weight * (x * rsqrt(mean(x^2) + eps))), fp32 inside. Strides in elements.
struct RmsNormParams {
  RmsNormFusion fusion = RmsNormFusion::kNone;
  const __nv_bfloat16* x = nullptr;           // [rows, width]
  const __nv_bfloat16* weight = nullptr;      // [width]
  const __nv_bfloat16* out_weight = nullptr;  // [width]; null but with kAddAfterNorm
  const int32_t* x_rows = nullptr;    // [rows]: out[r] = norm(x[x_rows[r]]), each 0 or more; null: x[r]. kNone only
  __nv_bfloat16* residual = nullptr;  // [rows, width]; null with kNone
  __nv_bfloat16* out = nullptr;       // [rows, width], may be x without x_rows; null with kAddAfter
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;  // 0 with kNone
  int64_t out_stride = 0;       // 0 with kAddAfter
  float eps = 0;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);
// Two norms of as many rows in one launch, such as those of q and k. Their outputs must not overlap the other's x.
absl::Status LaunchRmsNormPair(const RmsNormParams& first, const RmsNormParams& second, cudaStream_t stream);

}  // namespace lockstep::cuda

// RMSNorm, alone or with the residual addition before or after it, bit for bit as PyTorch computes it on a GPU: all in
// bf16, or as under autocast.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// Widths outside are refused: PyTorch chooses the reduction's shape by width, and its order is known for these.
constexpr int64_t kMinRmsNormWidth = 128;
constexpr int64_t kMaxRmsNormWidth = 4096;

enum class RmsNormFusion {
  kNone,          // out = norm(x)
  kAddBefore,     // residual = round(residual + x); out = norm(residual)
  kAddAfter,      // residual = round(residual + norm(x))
  kAddAfterNorm,  // residual = round(residual + norm(x)); out = norm(residual) with out_weight
};

// norm(x) = round(weight * (x * rsqrt(mean(x^2) + eps))), fp32 inside, rounded to bf16: of an fp32 x too, whose norm
// goes into linear layers only, which take it in bf16. A sum is rounded to the residual's dtype. Strides in elements.
struct RmsNormParams {
  RmsNormFusion fusion = RmsNormFusion::kNone;
  const void* x = nullptr;           // [rows, width] of x_dtype
  const void* weight = nullptr;      // [width] of weight_dtype
  const void* out_weight = nullptr;  // [width], bf16; null but with kAddAfterNorm
  const int32_t* x_rows = nullptr;   // [rows]: out[r] = norm(x[x_rows[r]]), each 0 or more; null: x[r]. kNone only
  void* residual = nullptr;          // [rows, width] of residual_dtype; null with kNone
  __nv_bfloat16* out = nullptr;      // [rows, width], may be a bf16 x without x_rows; null with kAddAfter
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;  // 0 with kNone
  int64_t out_stride = 0;       // 0 with kAddAfter
  float eps = 0;
  // All bf16; or the weight and the residual stream fp32, which with kNone may be x. Not with kAddAfterNorm.
  DType x_dtype = DType::kBF16;
  DType weight_dtype = DType::kBF16;
  DType residual_dtype = DType::kBF16;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);
// Two norms in bf16 of as many rows in one launch, such as those of q and k. Their outputs must not overlap the other's
// x.
absl::Status LaunchRmsNormPair(const RmsNormParams& first, const RmsNormParams& second, cudaStream_t stream);

}  // namespace lockstep::cuda

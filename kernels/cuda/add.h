// The residual addition, of a bf16 or fp32 residual stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// residual = round(residual + x). Strides in elements.
struct AddParams {
  const __nv_bfloat16* x = nullptr;  // [rows, width]
  void* residual = nullptr;          // [rows, width] of residual_dtype
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;
  DType residual_dtype = DType::kBF16;  // or kF32

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchAdd(const AddParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

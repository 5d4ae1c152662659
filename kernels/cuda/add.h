// The residual addition in bf16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// residual = round(residual + x). Strides in elements.
struct AddParams {
  const __nv_bfloat16* x = nullptr;   // [rows, width]
  __nv_bfloat16* residual = nullptr;  // [rows, width]
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchAdd(const AddParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

// fp32 rows to bf16: what a linear layer takes of an fp32 residual stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// out = x rounded to nearest even. Strides in elements.
struct RoundRowsParams {
  const float* x = nullptr;      // [rows, width]
  __nv_bfloat16* out = nullptr;  // [rows, width]; must not overlap x
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t out_stride = 0;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchRoundRows(const RoundRowsParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

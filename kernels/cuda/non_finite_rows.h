// Which rows hold a NaN or an infinity.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// flags[r] = 1 if a value of x[r] is not finite, else 0.
struct NonFiniteRowsParams {
  const __nv_bfloat16* x = nullptr;  // [rows, width]
  int32_t* flags = nullptr;          // [rows]
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;  // elements

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchNonFiniteRows(const NonFiniteRowsParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

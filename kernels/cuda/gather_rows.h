// Rows of a bf16 or fp32 matrix by index: what of a step's hidden states goes on to the logits. With the final norm in
// the same launch it is RmsNormParams::x_rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// out[r] = in[indices[r]]. Strides in elements.
struct GatherRowsParams {
  const int32_t* indices = nullptr;  // [rows], each in [0, in_rows): another value traps on the device
  const void* in = nullptr;          // [in_rows, width] of dtype
  void* out = nullptr;               // [rows, width] of dtype; must not overlap `in`
  int64_t rows = 0;
  int64_t in_rows = 0;
  int64_t width = 0;
  int64_t in_stride = 0;
  int64_t out_stride = 0;
  DType dtype = DType::kBF16;  // or kF32

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchGatherRows(const GatherRowsParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

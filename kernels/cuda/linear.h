// The linear layer in bf16: every output is one fp32 accumulator of the tensor cores over ascending k, in groups of 16,
// rounded once. That is what cuBLAS computes wherever it does not split k, bit for bit, so a row's bits depend on
// neither the number of rows nor the tile. Hopper only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/linear_plan.h"

namespace lockstep::cuda {

constexpr int64_t kLinearInputMultiple = 16;  // k is a multiple of it

enum class LinearOutput { kBf16, kFp32 };

// out = round(x * weight^T), or of kSwiGlu what LaunchSwiGlu makes of that, bit for bit. Strides in elements.
struct LinearParams {
  const __nv_bfloat16* x = nullptr;              // [m, k]
  const __nv_bfloat16* weight = nullptr;         // [n, k], rows side by side; kSwiGlu: [2n, k], gate's n and up's
  void* out = nullptr;                           // [m, n]; must not overlap the operands
  LinearOutput out_dtype = LinearOutput::kBf16;  // kSwiGlu: kBf16 alone
  LinearFusion fusion = LinearFusion::kNone;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t x_stride = 0;
  int64_t out_stride = 0;
  // May start before the stream's previous kernel has ended: it reads the weight at once, but x, and writes out, only
  // after that kernel's end. Not where a kernel that writes the weight can still be running: since such a kernel there
  // must have been a launch without an early start, or a copy or a wait of the stream.
  bool early_start = false;

  absl::Status Validate() const;
};

// Asynchronous on `stream`, without allocation, and the same whether captured or not. Zero rows are no work.
absl::Status LaunchLinear(const LinearParams& params, cudaStream_t stream);

// With a tile of the caller's choice.
absl::Status LaunchLinear(const LinearParams& params, const LinearTile& tile, cudaStream_t stream);

}  // namespace lockstep::cuda

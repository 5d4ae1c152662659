#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/non_finite_rows.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kPair = 2;  // a vocabulary is even, but its rows' vectors of 8 need not be aligned
constexpr uint32_t kExponent = 0x7F80;

__device__ bool NonFinite(uint32_t bits) {
  return (bits & kExponent) == kExponent || (bits >> 16 & kExponent) == kExponent;
}

// Grid: (rows), 512 threads, a block a row.
// Traffic: 2 bytes an element.
__global__ void __launch_bounds__(kThreads) NonFiniteRowsKernel(const __grid_constant__ NonFiniteRowsParams params) {
  FollowPreviousKernel();
  const auto* pairs = reinterpret_cast<const uint32_t*>(params.x + blockIdx.x * params.x_stride);
  bool found = false;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < params.width / kPair; i += kThreads) found |= NonFinite(pairs[i]);
  const int any = __syncthreads_or(found);
  if (threadIdx.x == 0) params.flags[blockIdx.x] = any != 0 ? 1 : 0;
}

}  // namespace

absl::Status NonFiniteRowsParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("NonFiniteRowsParams.rows", rows, "0 to 2^31 - 1");
  if (width <= 0 || width % kPair != 0) return BadField("NonFiniteRowsParams.width", width, "a multiple of 2");
  absl::Status status = CheckPointer("NonFiniteRowsParams.x", x, kPair * sizeof(*x));
  status.Update(CheckPointer("NonFiniteRowsParams.flags", flags, sizeof(*flags)));
  status.Update(CheckStride("NonFiniteRowsParams.x_stride", x_stride, width, kPair));
  return status;
}

absl::Status LaunchNonFiniteRows(const NonFiniteRowsParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  return LaunchOverlapped("NonFiniteRows", NonFiniteRowsKernel, static_cast<unsigned>(params.rows), kThreads, stream,
                          params);
}

}  // namespace lockstep::cuda

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;

using Vector = Bf16s<kVector>;

// Grid: (rows), 128 threads, a block a row.
// Traffic: 4 bytes an element (read and written) and 4 bytes an index.
__global__ void __launch_bounds__(kThreads) GatherRowsKernel(const __grid_constant__ GatherRowsParams params) {
  FollowPreviousKernel();
  const int64_t row = blockIdx.x;
  const int64_t index = params.indices[row];
  if (index < 0 || index >= params.in_rows) __trap();
  const __nv_bfloat16* from = params.in + index * params.in_stride;
  __nv_bfloat16* to = params.out + row * params.out_stride;
  for (int64_t i = threadIdx.x * kVector; i < params.width; i += kThreads * kVector)
    Store(Load<kVector>(from + i), to + i);
}

}  // namespace

absl::Status GatherRowsParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("GatherRowsParams.rows", rows, "0 to 2^31 - 1");
  if (in_rows <= 0 || in_rows > INT32_MAX) return BadField("GatherRowsParams.in_rows", in_rows, "1 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0) return BadField("GatherRowsParams.width", width, "a multiple of 8");
  absl::Status status = CheckPointer("GatherRowsParams.indices", indices, sizeof(*indices));
  status.Update(CheckPointer("GatherRowsParams.in", in, sizeof(Vector)));
  status.Update(CheckPointer("GatherRowsParams.out", out, sizeof(Vector)));
  status.Update(CheckStride("GatherRowsParams.in_stride", in_stride, width, kVector));
  status.Update(CheckStride("GatherRowsParams.out_stride", out_stride, width, kVector));
  return status;
}

absl::Status LaunchGatherRows(const GatherRowsParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  return LaunchOverlapped("GatherRows", GatherRowsKernel, static_cast<unsigned>(params.rows), kThreads, stream, params);
}

}  // namespace lockstep::cuda

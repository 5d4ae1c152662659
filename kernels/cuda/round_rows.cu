#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/round_rows.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;
constexpr uintptr_t kAlignment = 16;

// Grid: (ceil(rows * width / 8 / 128)), 128 threads, a thread 8 neighbouring elements.
// Traffic: 6 bytes an element (4 read, 2 written).
__global__ void __launch_bounds__(kThreads) RoundRowsKernel(const __grid_constant__ RoundRowsParams params) {
  FollowPreviousKernel();
  const unsigned vectors = static_cast<unsigned>(params.width) / kVector;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  const int64_t row = index / vectors;
  if (row >= params.rows) return;
  const int64_t column = index % vectors * kVector;
  Store(Pack(Load<kVector>(params.x + row * params.x_stride + column)), params.out + row * params.out_stride + column);
}

}  // namespace

absl::Status RoundRowsParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("RoundRowsParams.rows", rows, "0 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0 || width > INT32_MAX) {
    return BadField("RoundRowsParams.width", width, "a multiple of 8 from 8 to 2^31 - 1");
  }
  if (rows * (width / kVector) > INT32_MAX) return BadField("RoundRowsParams.rows", rows, "rows * width below 2^34");
  absl::Status status = CheckPointer("RoundRowsParams.x", x, kAlignment);
  status.Update(CheckPointer("RoundRowsParams.out", out, kAlignment));
  status.Update(CheckStride("RoundRowsParams.x_stride", x_stride, width, kVector));
  status.Update(CheckStride("RoundRowsParams.out_stride", out_stride, width, kVector));
  return status;
}

absl::Status LaunchRoundRows(const RoundRowsParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const int64_t blocks = (params.rows * (params.width / kVector) + kThreads - 1) / kThreads;
  return LaunchOverlapped("RoundRows", RoundRowsKernel, static_cast<unsigned>(blocks), kThreads, stream, params);
}

}  // namespace lockstep::cuda

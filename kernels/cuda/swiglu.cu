#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/swiglu.cuh"
#include "kernels/cuda/swiglu.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;

using Vector = Bf16s<kVector>;

// Grid: (ceil(rows * width / 8 / 256)), 256 threads, a thread 8 neighbouring outputs.
// Traffic: 6 bytes an output (gate and up read, out written), each once.
__global__ void __launch_bounds__(kThreads) SwiGluKernel(const __grid_constant__ SwiGluParams params) {
  FollowPreviousKernel();
  const unsigned vectors = static_cast<unsigned>(params.width) / kVector;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  const int64_t row = index / vectors;
  if (row >= params.rows) return;
  const int64_t column = index % vectors * kVector;
  const __nv_bfloat16* gate_row = params.gate_up + row * params.gate_up_stride;
  const Vector gate = Load<kVector>(gate_row + column);
  const Vector up = Load<kVector>(gate_row + params.width + column);
  Store(SwiGlu(gate, up), params.out + row * params.out_stride + column);
}

}  // namespace

absl::Status SwiGluParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("SwiGluParams.rows", rows, "0 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0 || width > INT32_MAX) {
    return BadField("SwiGluParams.width", width, "a multiple of 8 from 8 to 2^31 - 1");
  }
  if (rows * (width / kVector) > INT32_MAX) return BadField("SwiGluParams.rows", rows, "rows * width below 2^34");
  absl::Status status = CheckPointer("SwiGluParams.gate_up", gate_up, sizeof(Vector));
  status.Update(CheckPointer("SwiGluParams.out", out, sizeof(Vector)));
  status.Update(CheckStride("SwiGluParams.gate_up_stride", gate_up_stride, 2 * width, kVector));
  status.Update(CheckStride("SwiGluParams.out_stride", out_stride, width, kVector));
  return status;
}

absl::Status LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const int64_t blocks = (params.rows * (params.width / kVector) + kThreads - 1) / kThreads;
  return LaunchOverlapped("SwiGlu", SwiGluKernel, static_cast<unsigned>(blocks), kThreads, stream, params);
}

}  // namespace lockstep::cuda

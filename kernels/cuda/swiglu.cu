#include "kernels/cuda/params.h"
#include "kernels/cuda/swiglu.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 elements of a 16-byte load

struct alignas(16) Bf16x8 {
  __nv_bfloat16 v[kVector];
};

// x / (1 + e^-x) with the accurate expf and the IEEE quotient: PyTorch's silu.
__device__ __nv_bfloat16 Silu(__nv_bfloat16 value) {
  const float x = __bfloat162float(value);
  return __float2bfloat16_rn(__fdiv_rn(x, __fadd_rn(1.0f, expf(-x))));
}

// Grid: (ceil(rows * width / 8 / 256)), 256 threads, a thread 8 neighbouring outputs.
// Traffic: 6 bytes an output (gate and up read, out written), each once.
__global__ void __launch_bounds__(kThreads) SwiGluKernel(const __grid_constant__ SwiGluParams params) {
  const int64_t vectors = params.width / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / vectors;
  if (row >= params.rows) return;
  const int64_t column = (index - row * vectors) * kVector;
  const __nv_bfloat16* gate_row = params.gate_up + row * params.gate_up_stride;
  const Bf16x8 gate = *reinterpret_cast<const Bf16x8*>(gate_row + column);
  const Bf16x8 up = *reinterpret_cast<const Bf16x8*>(gate_row + params.width + column);
  Bf16x8 out;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    out.v[k] = __float2bfloat16_rn(__fmul_rn(__bfloat162float(Silu(gate.v[k])), __bfloat162float(up.v[k])));
  }
  *reinterpret_cast<Bf16x8*>(params.out + row * params.out_stride + column) = out;
}

int64_t Blocks(const SwiGluParams& params) {
  return (params.rows * (params.width / kVector) + kThreads - 1) / kThreads;
}

}  // namespace

absl::Status SwiGluParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("SwiGluParams.rows", rows, "0 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0 || width > INT32_MAX) {
    return BadField("SwiGluParams.width", width, "a multiple of 8 from 8 to 2^31 - 1");
  }
  if (Blocks(*this) > INT32_MAX) return BadField("SwiGluParams.rows", rows, "rows * width below 2^42");
  if (absl::Status status = CheckPointer("SwiGluParams.gate_up", gate_up, sizeof(Bf16x8)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("SwiGluParams.out", out, sizeof(Bf16x8)); !status.ok()) return status;
  if (absl::Status status = CheckStride("SwiGluParams.gate_up_stride", gate_up_stride, 2 * width, kVector);
      !status.ok())
    return status;
  return CheckStride("SwiGluParams.out_stride", out_stride, width, kVector);
}

absl::Status LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  SwiGluKernel<<<static_cast<unsigned>(Blocks(params)), kThreads, 0, stream>>>(params);
  return LaunchStatus("SwiGlu");
}

}  // namespace lockstep::cuda

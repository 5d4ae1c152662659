#include "kernels/cuda/add.h"
#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;

using Vector = Bf16s<kVector>;

// Grid: (ceil(rows * width / 8 / 128)), 128 threads, a thread 8 neighbouring elements.
// Traffic: 6 bytes an element (x and the residual read, the residual written), 10 with an fp32 residual.
template <class R>
__global__ void __launch_bounds__(kThreads) AddKernel(const __grid_constant__ AddParams params) {
  FollowPreviousKernel();
  const unsigned vectors = static_cast<unsigned>(params.width) / kVector;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  const int64_t row = index / vectors;
  if (row >= params.rows) return;
  const int64_t column = index % vectors * kVector;
  R* residual = static_cast<R*>(params.residual) + row * params.residual_stride + column;
  const Floats<kVector> x = Unpack(Load<kVector>(params.x + row * params.x_stride + column));
  Floats<kVector> sum = Unpack(Load<kVector>(residual));
#pragma unroll
  for (int k = 0; k < kVector; ++k) sum.v[k] = __fadd_rn(sum.v[k], x.v[k]);
  Store(PackAs<R>(sum), residual);
}

}  // namespace

absl::Status AddParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("AddParams.rows", rows, "0 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0 || width > INT32_MAX) {
    return BadField("AddParams.width", width, "a multiple of 8 from 8 to 2^31 - 1");
  }
  if (absl::Status status = CheckBf16OrF32("AddParams.residual_dtype", residual_dtype); !status.ok()) return status;
  if (rows * (width / kVector) > INT32_MAX) return BadField("AddParams.rows", rows, "rows * width below 2^34");
  absl::Status status = CheckPointer("AddParams.x", x, sizeof(Vector));
  status.Update(CheckPointer("AddParams.residual", residual, sizeof(Vector)));
  status.Update(CheckStride("AddParams.x_stride", x_stride, width, kVector));
  status.Update(CheckStride("AddParams.residual_stride", residual_stride, width, kVector));
  return status;
}

absl::Status LaunchAdd(const AddParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const int64_t blocks = (params.rows * (params.width / kVector) + kThreads - 1) / kThreads;
  const auto kernel = params.residual_dtype == DType::kF32 ? AddKernel<float> : AddKernel<__nv_bfloat16>;
  return LaunchOverlapped("Add", kernel, static_cast<unsigned>(blocks), kThreads, stream, params);
}

}  // namespace lockstep::cuda

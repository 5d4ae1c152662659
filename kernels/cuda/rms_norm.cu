#include <cmath>

#include "kernels/cuda/params.h"
#include "kernels/cuda/rms_norm.h"

namespace lockstep::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;
constexpr int kVector = 4;  // elements a lane takes at a time: part of the sum's order, see SumOfSquares
// Widths outside are refused: PyTorch chooses the reduction's shape by width, and its order is known for these.
constexpr int64_t kMinWidth = 128;
constexpr int64_t kMaxWidth = 4096;

struct alignas(8) Bf16x4 {
  __nv_bfloat162 low, high;
};

struct Floats {
  float v[kVector];
};

// Plain loads: with in-place operands the data is not read-only during the kernel.
__device__ Floats Load(const __nv_bfloat16* from) {
  const Bf16x4 raw = *reinterpret_cast<const Bf16x4*>(from);
  return {{__low2float(raw.low), __high2float(raw.low), __low2float(raw.high), __high2float(raw.high)}};
}

__device__ void Store(const Floats& f, __nv_bfloat16* to) {
  *reinterpret_cast<Bf16x4*>(to) = {__floats2bfloat162_rn(f.v[0], f.v[1]), __floats2bfloat162_rn(f.v[2], f.v[3])};
}

__device__ float RoundBf16(float value) {
  return __bfloat162float(__float2bfloat16_rn(value));
}

// PyTorch's row sum (at 16 rows and more): lane i has four accumulators over elements 4i..4i+3 of every 128, adds them
// from the left, and the lanes' sums meet in a tree of distance 16, 8, 4, 2, 1. Addition commutes, so with xor all
// lanes end with lane 0's bits.
__device__ float WarpSum(const Floats& sums) {
  float sum = __fadd_rn(__fadd_rn(__fadd_rn(sums.v[0], sums.v[1]), sums.v[2]), sums.v[3]);
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, distance));
  }
  return sum;
}

// Grid: (ceil(rows / 4)), 4 warps a block, a warp a row.
// Traffic: x (and residual) read once from memory and out (and residual) written once, 2 bytes an element; the second
// pass over the row, at most 8 KB, and the weight come from L1 and L2.
template <RmsNormFusion kFusion>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) RmsNormKernel(const __grid_constant__ RmsNormParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= params.rows) return;  // a whole warp: the shuffles below stay complete
  const int64_t begin = static_cast<int64_t>(threadIdx.x % kWarp) * kVector;
  constexpr int64_t kStep = kWarp * kVector;
  const __nv_bfloat16* x = params.x + row * params.x_stride;
  __nv_bfloat16* residual = kFusion == RmsNormFusion::kNone ? nullptr : params.residual + row * params.residual_stride;

  Floats sums = {};
  for (int64_t i = begin; i < params.width; i += kStep) {
    Floats f = Load(x + i);
    if constexpr (kFusion == RmsNormFusion::kAddBefore) {
      const Floats old = Load(residual + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) f.v[k] = RoundBf16(__fadd_rn(old.v[k], f.v[k]));
      Store(f, residual + i);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) sums.v[k] = __fadd_rn(sums.v[k], __fmul_rn(f.v[k], f.v[k]));
  }
  // PyTorch multiplies by the rounded reciprocal of the width.
  const float mean = __fmul_rn(WarpSum(sums), __fdiv_rn(1.0f, static_cast<float>(params.width)));
  const float inverse = rsqrtf(__fadd_rn(mean, params.eps));

  // A lane reads again only what it alone has read or written, so out may be x.
  const __nv_bfloat16* normed = kFusion == RmsNormFusion::kAddBefore ? residual : x;
  for (int64_t i = begin; i < params.width; i += kStep) {
    Floats f = Load(normed + i);
    const Floats weight = Load(params.weight + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) f.v[k] = __fmul_rn(weight.v[k], __fmul_rn(f.v[k], inverse));
    if constexpr (kFusion == RmsNormFusion::kAddAfter) {
      const Floats old = Load(residual + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k) f.v[k] = __fadd_rn(old.v[k], RoundBf16(f.v[k]));
      Store(f, residual + i);
    } else {
      Store(f, params.out + row * params.out_stride + i);
    }
  }
}

absl::Status CheckRows(const char* field, const char* stride_field, const void* pointer, int64_t stride,
                       int64_t width) {
  if (absl::Status status = CheckPointer(field, pointer, sizeof(Bf16x4)); !status.ok()) return status;
  return CheckStride(stride_field, stride, width, kVector);
}

}  // namespace

absl::Status RmsNormParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("RmsNormParams.rows", rows, "0 to 2^31 - 1");
  if (width < kMinWidth || width > kMaxWidth || width % kVector != 0) {
    return BadField("RmsNormParams.width", width, "a multiple of 4 from 128 to 4096");
  }
  if (!(eps >= 0.0f) || std::isinf(eps)) return BadField("RmsNormParams.eps", eps, "a finite value, 0 or more");
  if (absl::Status status = CheckRows("RmsNormParams.x", "RmsNormParams.x_stride", x, x_stride, width); !status.ok())
    return status;
  if (absl::Status status = CheckPointer("RmsNormParams.weight", weight, sizeof(Bf16x4)); !status.ok()) return status;
  if (fusion != RmsNormFusion::kNone) {
    if (absl::Status status =
            CheckRows("RmsNormParams.residual", "RmsNormParams.residual_stride", residual, residual_stride, width);
        !status.ok())
      return status;
  } else if (residual != nullptr) {
    return BadField("RmsNormParams.residual", "a pointer", "null with RmsNormFusion::kNone");
  }
  if (fusion != RmsNormFusion::kAddAfter) {
    return CheckRows("RmsNormParams.out", "RmsNormParams.out_stride", out, out_stride, width);
  }
  if (out != nullptr) return BadField("RmsNormParams.out", "a pointer", "null with RmsNormFusion::kAddAfter");
  return absl::OkStatus();
}

absl::Status LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const auto blocks = static_cast<unsigned>((params.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  constexpr int kThreads = kWarp * kRowsPerBlock;
  switch (params.fusion) {
    case RmsNormFusion::kNone:
      RmsNormKernel<RmsNormFusion::kNone><<<blocks, kThreads, 0, stream>>>(params);
      break;
    case RmsNormFusion::kAddBefore:
      RmsNormKernel<RmsNormFusion::kAddBefore><<<blocks, kThreads, 0, stream>>>(params);
      break;
    case RmsNormFusion::kAddAfter:
      RmsNormKernel<RmsNormFusion::kAddAfter><<<blocks, kThreads, 0, stream>>>(params);
      break;
  }
  return LaunchStatus("RmsNorm");
}

}  // namespace lockstep::cuda

#include <cmath>

#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/rope.h"

namespace lockstep::cuda {
namespace {

constexpr int kHeadDim = 128;
constexpr int kHalf = kHeadDim / 2;
constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 elements of a 16-byte load
constexpr int kHeadVectors = kHalf / kVector;

struct alignas(16) Bf16x8 {
  __nv_bfloat16 v[kVector];
};

// q * cos + rotate_half(q) * sin, each operation of transformers' expression rounded on its own.
__device__ __nv_bfloat16 Rotated(float x, float cos, float other, float sin) {
  return __float2bfloat16_rn(__fadd_rn(__fmul_rn(x, cos), __fmul_rn(other, sin)));
}

// Grid: (rows), 256 threads: 64 of them compute the row's cos and sin, then a thread rotates 8 pairs of a head at a
// time. Traffic: 4 bytes an element (read and written once).
__global__ void __launch_bounds__(kThreads) RopeKernel(const __grid_constant__ RopeParams params) {
  FollowPreviousKernel();
  const int64_t row = blockIdx.x;
  if (params.batch.row_piece[row] < 0) return;
  __shared__ float cos[kHalf];
  __shared__ float sin[kHalf];
  if (threadIdx.x < kHalf) {
    const float angle = __fmul_rn(params.inv_freq[threadIdx.x], __int2float_rn(params.batch.positions[row]));
    cos[threadIdx.x] = __fmul_rn(cosf(angle), params.attention_scaling);
    sin[threadIdx.x] = __fmul_rn(sinf(angle), params.attention_scaling);
  }
  __syncthreads();
  const int heads = static_cast<int>(params.heads);
  const int vectors = (heads + static_cast<int>(params.kv_heads)) * kHeadVectors;
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) {
    const int head = i / kHeadVectors;
    const int begin = i % kHeadVectors * kVector;
    __nv_bfloat16* base = head < heads ? params.q + row * params.q_stride + head * kHeadDim
                                       : params.k + row * params.k_stride + (head - heads) * kHeadDim;
    auto* first = reinterpret_cast<Bf16x8*>(base + begin);
    auto* second = reinterpret_cast<Bf16x8*>(base + kHalf + begin);
    const Bf16x8 a = *first;
    const Bf16x8 b = *second;
    Bf16x8 rotated_a;
    Bf16x8 rotated_b;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float x = __bfloat162float(a.v[j]);
      const float y = __bfloat162float(b.v[j]);
      rotated_a.v[j] = Rotated(x, cos[begin + j], -y, sin[begin + j]);
      rotated_b.v[j] = Rotated(y, cos[begin + j], x, sin[begin + j]);
    }
    *first = rotated_a;
    *second = rotated_b;
  }
}

}  // namespace

absl::Status RopeParams::Validate() const {
  if (batch.rows < 0) return BadField("RopeParams.batch.rows", batch.rows, "0 or more");
  if (heads <= 0 || heads > 65536) return BadField("RopeParams.heads", heads, "1 to 65536");
  if (kv_heads <= 0 || kv_heads > 65536) return BadField("RopeParams.kv_heads", kv_heads, "1 to 65536");
  if (!std::isfinite(attention_scaling)) {
    return BadField("RopeParams.attention_scaling", attention_scaling, "a finite value");
  }
  if (absl::Status status = CheckPointer("RopeParams.q", q, sizeof(Bf16x8)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("RopeParams.k", k, sizeof(Bf16x8)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("RopeParams.inv_freq", inv_freq, sizeof(float)); !status.ok()) return status;
  if (absl::Status status = CheckStride("RopeParams.q_stride", q_stride, heads * kHeadDim, kVector); !status.ok())
    return status;
  if (absl::Status status = CheckStride("RopeParams.k_stride", k_stride, kv_heads * kHeadDim, kVector); !status.ok())
    return status;
  if (absl::Status status = CheckPointer("RopeParams.batch.positions", batch.positions, sizeof(int32_t)); !status.ok())
    return status;
  return CheckPointer("RopeParams.batch.row_piece", batch.row_piece, sizeof(int32_t));
}

absl::Status LaunchRope(const RopeParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.batch.rows == 0) return absl::OkStatus();
  return LaunchOverlapped("Rope", RopeKernel, static_cast<unsigned>(params.batch.rows), kThreads, stream, params);
}

}  // namespace lockstep::cuda

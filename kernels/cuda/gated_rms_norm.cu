#include <cmath>

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQuad = 4;  // elements of one accumulator set in PyTorch's order
constexpr int kHalf = kWarp / 2;
constexpr int kVector = 8;

using Vector = Bf16s<kVector>;

struct Place {
  const __nv_bfloat16* x;
  const __nv_bfloat16* gate;
  __nv_bfloat16* out;  // null past the end
};

// Head `index` of [rows, heads]. Past the end it is the last one again, to be read only: the warp stays complete for
// its shuffles.
__device__ Place FindHead(const GatedRmsNormParams& p, unsigned index) {
  const auto heads = static_cast<unsigned>(p.heads);
  const unsigned last = static_cast<unsigned>(p.rows) * heads - 1;
  const bool exists = index <= last;
  index = exists ? index : last;
  const int64_t row = index / heads;
  const int64_t column = index % heads * p.head_dim;
  return {p.x + row * p.x_stride + column, p.gate + row * p.gate_stride + column,
          exists ? p.out + row * p.out_stride + column : nullptr};
}

// PyTorch's sum over a row (see rms_norm.cu) has 32 lanes, of which a thread here plays two, t and t + 16: quads of
// elements t, t + 32, ... and t + 16, t + 48, ... So the tree's first step is inside the thread.
template <int kQuads>
__device__ float SumOfSquares(const Floats<kQuad> (&x)[kQuads]) {
  float lanes[2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) {
    Floats<kQuad> sums = {};
#pragma unroll
    for (int q = lane; q < kQuads; q += 2) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums.v[i] = __fadd_rn(sums.v[i], __fmul_rn(x[q].v[i], x[q].v[i]));
    }
    lanes[lane] = __fadd_rn(__fadd_rn(__fadd_rn(sums.v[0], sums.v[1]), sums.v[2]), sums.v[3]);
  }
  float sum = __fadd_rn(lanes[0], lanes[1]);
#pragma unroll
  for (int distance = kHalf / 2; distance >= 1; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, distance));
  }
  return sum;
}

template <int kQuads>
__device__ void ApplySilu(Floats<kQuad> (&gate)[kQuads]) {
  float largest = 0.0f;
  Floats<kQuad> silu[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      largest = fmaxf(largest, fabsf(gate[q].v[i]));
      silu[q].v[i] = SiluInRange(gate[q].v[i]);
    }
  }
  if (largest > kSiluRange) {
    for (int q = 0; q < kQuads; ++q) {
      for (int i = 0; i < kQuad; ++i) silu[q].v[i] = Silu(gate[q].v[i]);
    }
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) gate[q] = silu[q];
}

// Grid: (ceil(rows * heads / 8)), 128 threads, 16 threads a head of 64 * kQuads elements.
// Traffic: 6 bytes an element (x and gate read, out written).
// Weight: bf16 for kThree, float for kTwo.
template <int kQuads, class Weight>
__global__ void __launch_bounds__(kThreads) GatedRmsNormKernel(const __grid_constant__ GatedRmsNormParams p) {
  FollowPreviousKernel();
  const int thread = static_cast<int>(threadIdx.x) % kHalf;
  const Place place = FindHead(p, blockIdx.x * (kThreads / kHalf) + threadIdx.x / kHalf);
  Floats<kQuad> x[kQuads], gate[kQuads], weight[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int column = (q * kHalf + thread) * kQuad;
    x[q] = Unpack(Load<kQuad>(place.x + column));
    gate[q] = Unpack(Load<kQuad>(place.gate + column));
    weight[q] = Unpack(Load<kQuad>(static_cast<const Weight*>(p.weight) + column));
  }
  ApplySilu<kQuads>(gate);
  const float mean = __fmul_rn(SumOfSquares<kQuads>(x), 1.0f / (kQuads * kHalf * kQuad));
  const float inverse = rsqrtf(__fadd_rn(mean, p.eps));
  if (place.out == nullptr) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    Floats<kQuad> y;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(x[q].v[i], inverse);
    y = RoundBf16(y);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(weight[q].v[i], y.v[i]);
    if constexpr (!std::is_same_v<Weight, float>) y = RoundBf16(y);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(y.v[i], gate[q].v[i]);
    Store(Pack(y), place.out + (q * kHalf + thread) * kQuad);
  }
}

// Grid: (ceil(rows * heads / (128 / kLanes))), 128 threads, kLanes threads a head, 8 elements a thread.
// Traffic: as above.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) FusedGatedRmsNormKernel(const __grid_constant__ GatedRmsNormParams p) {
  FollowPreviousKernel();
  const int column = static_cast<int>(threadIdx.x) % kLanes * kVector;
  const Place place = FindHead(p, blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes);
  const bool active = column < p.head_dim;
  const Vector x_vector = active ? Load<kVector>(place.x + column) : Vector{};
  const Vector gate_vector = active ? Load<kVector>(place.gate + column) : Vector{};
  const Vector weight_vector = active ? Load<kVector>(static_cast<const __nv_bfloat16*>(p.weight) + column) : Vector{};
  const Floats<kVector> x = Unpack(x_vector);
  const float mean = DivideFull(TritonSumOfSquares<kLanes>(x), static_cast<float>(p.head_dim));
  const float inverse = DivideFull(1.0f, SqrtApprox(__fadd_rn(mean, p.eps)));
  if (!active || place.out == nullptr) return;
  const Floats<kVector> gate = Unpack(gate_vector);
  const Floats<kVector> weight = Unpack(weight_vector);
  Floats<kVector> y;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float weighted = __fmul_rn(__fmul_rn(x.v[i], inverse), weight.v[i]);
    y.v[i] = __fmul_rn(__fmul_rn(weighted, gate.v[i]), TritonSigmoid(gate.v[i]));
  }
  Store(Pack(y), place.out + column);
}

template <class Weight>
auto KernelFor(int64_t head_dim) {
  if (head_dim == 192) return GatedRmsNormKernel<3, Weight>;
  return head_dim == 256 ? GatedRmsNormKernel<4, Weight> : GatedRmsNormKernel<2, Weight>;
}

}  // namespace

absl::Status GatedRmsNormParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("GatedRmsNormParams.rows", rows, "0 to 2^31 - 1");
  if (heads <= 0 || heads > 1024) return BadField("GatedRmsNormParams.heads", heads, "1 to 1024");
  if (rows * heads > INT32_MAX) return BadField("GatedRmsNormParams.rows", rows, "rows * heads below 2^31");
  if (head_dim != 128 && head_dim != 192 && head_dim != 256) {
    return BadField("GatedRmsNormParams.head_dim", head_dim, "128, 192 or 256");
  }
  if (!(eps >= 0.0f) || std::isinf(eps)) return BadField("GatedRmsNormParams.eps", eps, "a finite value, 0 or more");
  constexpr uintptr_t kAlignment = sizeof(Vector);
  const int64_t width = heads * head_dim;
  absl::Status status = CheckPointer("GatedRmsNormParams.x", x, kAlignment);
  status.Update(CheckPointer("GatedRmsNormParams.gate", gate, kAlignment));
  status.Update(CheckPointer("GatedRmsNormParams.weight", weight, kAlignment));
  status.Update(CheckPointer("GatedRmsNormParams.out", out, kAlignment));
  status.Update(CheckStride("GatedRmsNormParams.x_stride", x_stride, width, kVector));
  status.Update(CheckStride("GatedRmsNormParams.gate_stride", gate_stride, width, kVector));
  status.Update(CheckStride("GatedRmsNormParams.out_stride", out_stride, width, kVector));
  return status;
}

absl::Status LaunchGatedRmsNorm(const GatedRmsNormParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const bool fused = params.casts == GatedNormCasts::kOne;
  const int64_t threads_a_head = fused && params.head_dim > 128 ? kWarp : kHalf;
  const int64_t heads_a_block = kThreads / threads_a_head;
  const int64_t blocks = (params.rows * params.heads + heads_a_block - 1) / heads_a_block;
  auto kernel = params.casts == GatedNormCasts::kTwo ? KernelFor<float>(params.head_dim)
                                                     : KernelFor<__nv_bfloat16>(params.head_dim);
  if (fused) kernel = params.head_dim > 128 ? FusedGatedRmsNormKernel<kWarp> : FusedGatedRmsNormKernel<kHalf>;
  return LaunchOverlapped("GatedRmsNorm", kernel, static_cast<unsigned>(blocks), kThreads, stream, params);
}

}  // namespace lockstep::cuda

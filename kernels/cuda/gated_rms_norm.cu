#include <cmath>

#include "kernels/cuda/gated_norm.cuh"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
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
  const float inverse = InverseRms<kQuads * kHalf * kQuad>(SumOfSquares<kQuads>(x), p.eps);
  if (place.out == nullptr) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    Store(GatedNorm<Weight>(x[q], inverse, weight[q], gate[q]), place.out + (q * kHalf + thread) * kQuad);
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
  const float inverse = TritonInverseRms(TritonSumOfSquares<kLanes>(x), p.head_dim, p.eps);
  if (!active || place.out == nullptr) return;
  const Floats<kVector> gate = Unpack(gate_vector);
  Store(FusedGatedNorm(x, inverse, Unpack(weight_vector), gate, TritonSigmoid(gate)), place.out + column);
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

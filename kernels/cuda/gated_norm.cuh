// Device code of the gated norm's arithmetic: of a kernel of its own (gated_rms_norm.cu), and of the last part of GDN
// decode (gdn_decode.cu). 16 lanes have a head of 64 * kQuads elements in quads of neighbours: lane t quads t, t + 16,
// ...; fla's norm (kOne) has 8 neighbours a lane.
#pragma once

#include <type_traits>

#include "kernels/cuda/bf16_rows.cuh"

namespace lockstep::cuda {

constexpr int kQuad = 4;  // elements of one accumulator set in PyTorch's order
constexpr int kHalf = kWarp / 2;

// PyTorch's sum over a row (see rms_norm.cu) has 32 lanes, of which a thread here plays two, t and t + 16: quads of
// elements t, t + 32, ... and t + 16, t + 48, ... So the tree's first step is inside the thread.
template <int kQuads>
__device__ __forceinline__ float SumOfSquares(const Floats<kQuad> (&x)[kQuads]) {
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

// 1 / sqrt(mean of squares + eps), PyTorch's and Triton's.
template <int kWidth>
__device__ __forceinline__ float InverseRms(float sum, float eps) {
  return rsqrtf(__fadd_rn(__fmul_rn(sum, 1.0f / kWidth), eps));
}

__device__ __forceinline__ float TritonInverseRms(float sum, int64_t width, float eps) {
  const float mean = DivideFull(sum, static_cast<float>(width));
  return DivideFull(1.0f, SqrtApprox(__fadd_rn(mean, eps)));
}

template <int kQuads>
__device__ __forceinline__ void ApplySilu(Floats<kQuad> (&gate)[kQuads]) {
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

// kThree (Weight: bf16) and kTwo (float).
template <class Weight>
__device__ __forceinline__ Bf16s<kQuad> GatedNorm(const Floats<kQuad>& x, float inverse, const Floats<kQuad>& weight,
                                                  const Floats<kQuad>& silu) {
  Floats<kQuad> y;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(x.v[i], inverse);
  y = RoundBf16(y);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(weight.v[i], y.v[i]);
  if constexpr (!std::is_same_v<Weight, float>) y = RoundBf16(y);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) y.v[i] = __fmul_rn(y.v[i], silu.v[i]);
  return Pack(y);
}

// kOne.
template <int kCount>
__device__ __forceinline__ Bf16s<kCount> FusedGatedNorm(const Floats<kCount>& x, float inverse,
                                                        const Floats<kCount>& weight, const Floats<kCount>& gate,
                                                        const Floats<kCount>& sigmoid) {
  Floats<kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float weighted = __fmul_rn(__fmul_rn(x.v[i], inverse), weight.v[i]);
    y.v[i] = __fmul_rn(__fmul_rn(weighted, gate.v[i]), sigmoid.v[i]);
  }
  return Pack(y);
}

template <int kCount>
__device__ __forceinline__ Floats<kCount> TritonSigmoid(const Floats<kCount>& x) {
  Floats<kCount> y;
#pragma unroll
  for (int i = 0; i < kCount; ++i) y.v[i] = TritonSigmoid(x.v[i]);
  return y;
}

}  // namespace lockstep::cuda

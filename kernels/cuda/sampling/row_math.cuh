// Arithmetic of one logit, as the CPU sampler has it: division by the temperature, weight, mass, rank. Device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/sampling/device_task.h"

namespace lockstep::cuda {

inline constexpr float kLargestFloat = 3.402823466e38f;

__device__ inline float MinusInfinity() {
  return __uint_as_float(0xFF800000u);
}

// x / divisor, correctly rounded. With inverse = 1 / divisor rounded to nearest, and away from overflow and underflow,
// a quotient corrected twice by its exact remainder is the correctly rounded one.
struct Divisor {
  float divisor = 1.0f;  // 1e-4 to 1e4
  float inverse = 1.0f;

  __device__ float Divide(float x) const {
    const float magnitude = fabsf(x);
    if (!(magnitude > 0x1p-80f && magnitude < 0x1p80f)) return __fdiv_rn(x, divisor);
    float q = __fmul_rn(x, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, divisor, x), inverse, q);
    return __fmaf_rn(__fmaf_rn(-q, divisor, x), inverse, q);
  }
};

// TEMPERATURE's y.
struct TemperatureScale {
  Divisor divisor;
  TemperatureRounding rounding = TemperatureRounding::kDivide;

  __device__ float Apply(float x) const {
    if (rounding == TemperatureRounding::kDivide) return divisor.Divide(x);
    const float y = __fmul_rn(x, divisor.inverse);
    return rounding == TemperatureRounding::kReciprocal ? y : __bfloat162float(__float2bfloat16_rn(y));
  }
};

// e^d for d <= 0, 0 below -87: the operations of Exp in kernels/cpu/simd_util-inl.h, so the CPU sampler's bits. Above
// -87 the result is a normal number, so its exponent can be added as an integer.
__device__ inline float Weight(float d) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const float shifted = __fadd_rn(__fmul_rn(d, 0x1.715476p+0f), kMagic);
  const float n = __fsub_rn(shifted, kMagic);
  const float rest = __fmaf_rn(-n, 0x1.62e4p-1f, d);
  const float r = __fmaf_rn(-n, 0x1.7f7d1cp-20f, rest);
  const float r_low = __fmaf_rn(-n, 0x1.7f7d1cp-20f, __fsub_rn(rest, r));
  float p = 0x1.9f085ap-13f;
  p = __fmaf_rn(p, r, 0x1.6d8d52p-10f);
  p = __fmaf_rn(p, r, 0x1.111272p-7f);
  p = __fmaf_rn(p, r, 0x1.55548ep-5f);
  p = __fmaf_rn(p, r, 0x1.555554p-3f);
  const float square = __fmul_rn(r, r);
  const float half_square = __fmul_rn(0.5f, square);
  const float high = __fadd_rn(r, half_square);
  float low = __fsub_rn(half_square, __fsub_rn(high, r));
  low = __fadd_rn(low, __fmaf_rn(0.5f, __fmaf_rn(r, r, -square), r_low));
  low = __fmaf_rn(__fmul_rn(square, r), p, low);
  const float sum = __fadd_rn(1.0f, high);
  p = __fadd_rn(sum, __fadd_rn(__fsub_rn(high, __fsub_rn(sum, 1.0f)), low));
  // n's low bits are the low bits of shifted.
  const float scaled = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
  return d >= -87.0f ? scaled : 0.0f;
}

// The mass of a weight is high * 2^22 + low, both at most 2^22. A sum keeps the two apart, in 32 bits each, with
// kBias in every term: sums of up to 512 terms come out right modulo 2^32.
struct MassSum {
  static constexpr uint32_t kBias = 0x4B000000u;  // the bits of 2^23
  uint32_t high = 0, low = 0;

  __device__ void Add(float weight) {
    const float h = __fmaf_rz(weight, 0x1p22f, 0x1p23f);
    const float rest = __fmaf_rn(weight, 0x1p22f, -__fsub_rn(h, 0x1p23f));  // exact, below 1
    high += __float_as_uint(h);
    low += __float_as_uint(__fmaf_rn(rest, 0x1p22f, 0x1p23f));
  }
  // After `terms` calls of Add.
  __device__ void RemoveBias(uint32_t terms) {
    high -= terms * kBias;
    low -= terms * kBias;
  }
  __device__ uint64_t Total() const { return (static_cast<uint64_t>(high) << 22) + low; }
};

__device__ inline uint64_t MassOf(float weight) {
  MassSum sum;
  sum.Add(weight);
  sum.RemoveBias(1);
  return sum.Total();
}

// The upper half of a TokenKey (sampler/token_key.h): smaller for larger values, one for -0 and +0.
__device__ inline uint32_t RankKey(float value) {
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return (bits & 0x80000000u) != 0 ? bits : bits ^ 0x7FFFFFFFu;
}

__device__ inline float RankValue(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key : key ^ 0x7FFFFFFFu);
}

}  // namespace lockstep::cuda

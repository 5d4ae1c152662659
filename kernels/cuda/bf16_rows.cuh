// Device code that the row-wise operations share: bf16 vectors as one load or store, and the scalar functions of
// PyTorch and of Triton in their own bits.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/bf16_rows_ptx.cuh"

namespace lockstep::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// kCount bf16 values as they lie in memory, two a word. Words, not bf16 types, which compilers take apart.
template <int kCount>
struct Bf16s {
  uint32_t words[kCount / 2];
};

template <int kCount>
struct Floats {
  float v[kCount];
};

template <int kCount>
__device__ __forceinline__ Floats<kCount> Unpack(const Bf16s<kCount>& bf16s) {
  Floats<kCount> floats;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    floats.v[2 * i] = __uint_as_float(bf16s.words[i] << 16);
    floats.v[2 * i + 1] = __uint_as_float(bf16s.words[i] & 0xFFFF0000u);
  }
  return floats;
}

template <int kCount>
__device__ __forceinline__ Bf16s<kCount> Pack(const Floats<kCount>& floats) {
  Bf16s<kCount> bf16s;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    bf16s.words[i] = PackWord(floats.v[2 * i], floats.v[2 * i + 1]);
  }
  return bf16s;
}

// To bf16 and back, in pairs: converting single values takes the slow unit.
template <int kCount>
__device__ __forceinline__ Floats<kCount> RoundBf16(const Floats<kCount>& floats) {
  return Unpack(Pack(floats));
}

// kCount neighbours of a row of T, float or bf16.
template <class T, int kCount>
using VectorOf = std::conditional_t<std::is_same_v<T, float>, Floats<kCount>, Bf16s<kCount>>;

// So that one piece of code takes either row.
template <int kCount>
__device__ __forceinline__ Floats<kCount> Unpack(const Floats<kCount>& floats) {
  return floats;
}

template <class T, int kCount>
__device__ __forceinline__ VectorOf<T, kCount> PackAs(const Floats<kCount>& floats) {
  if constexpr (std::is_same_v<T, float>) {
    return floats;
  } else {
    return Pack(floats);
  }
}

// One access of 16 or 8 bytes. Plain loads: with in-place operands the data is not read-only during the kernel.
template <int kCount>
__device__ __forceinline__ Bf16s<kCount> Load(const __nv_bfloat16* from) {
  static_assert(kCount == 8 || kCount == 4);
  if constexpr (kCount == 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    return {{raw.x, raw.y}};
  }
}

template <int kCount>
__device__ __forceinline__ void Store(const Bf16s<kCount>& bf16s, __nv_bfloat16* to) {
  static_assert(kCount == 8 || kCount == 4);
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint4*>(to) = {bf16s.words[0], bf16s.words[1], bf16s.words[2], bf16s.words[3]};
  } else {
    *reinterpret_cast<uint2*>(to) = {bf16s.words[0], bf16s.words[1]};
  }
}

// fp32 rows: 16 bytes an access.
template <int kCount>
__device__ __forceinline__ Floats<kCount> Load(const float* from) {
  static_assert(kCount % 4 == 0);
  Floats<kCount> floats;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 raw = *reinterpret_cast<const float4*>(from + i);
    floats.v[i] = raw.x;
    floats.v[i + 1] = raw.y;
    floats.v[i + 2] = raw.z;
    floats.v[i + 3] = raw.w;
  }
  return floats;
}

template <int kCount>
__device__ __forceinline__ void Store(const Floats<kCount>& floats, float* to) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    *reinterpret_cast<float4*>(to + i) = {floats.v[i], floats.v[i + 1], floats.v[i + 2], floats.v[i + 3]};
  }
}

// PyTorch's functions of one fp32 value: the accurate exponential and logarithm, IEEE quotients.
__device__ __forceinline__ float Sigmoid(float x) {
  return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-x)));
}

__device__ __forceinline__ float Silu(float x) {
  return __fdiv_rn(x, __fadd_rn(1.0f, expf(-x)));
}

__device__ __forceinline__ float Softplus(float x) {
  return x > 20.0f ? x : log1pf(expf(x));
}

// Silu(x) rounded to bf16, of an x that is a bf16 value: the same bits for each of the 65,536 (a test tries them all)
// at a third of the instructions. Not for other x, nor for another rounding. Divisor and dividend are scaled by 2^-4,
// so that the reciprocal is no subnormal number before the exponential overflows.
__device__ __forceinline__ float SiluOfBf16(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float e = Exp2ApproxFtz(__fmul_rn(x, -kLog2E));
  const float inverse = ReciprocalApprox(__fmaf_rn(e, 0x1p-4f, 0x1p-4f));
  return __fmul_rn(__fmul_rn(x, 0x1p-4f), inverse);
}

// Silu(x) itself, in every bit, of a bf16 value of at most kSiluRange in magnitude: the quotient without the checks
// that other operands need (a test tries all values).
constexpr float kSiluRange = 80.0f;
__device__ __forceinline__ float SiluInRange(float x) {
  const float divisor = __fadd_rn(1.0f, expf(-x));
  const float inverse = ReciprocalApprox(divisor);
  const float quotient = __fmul_rn(x, inverse);
  return copysignf(__fmaf_rn(__fmaf_rn(-divisor, quotient, x), inverse, quotient), x);  // x = -0
}

__device__ __forceinline__ float TritonSigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return DivideFull(1.0f, __fadd_rn(1.0f, Exp2Approx(__fmul_rn(-x, kLog2E))));
}

// Triton's sum of squares of a row that lies in kLanes neighbouring lanes, 8 neighbouring elements a lane (absent ones
// zero): the compiler contracts the second product into the first. All kLanes lanes get the sum.
template <int kLanes>
__device__ __forceinline__ float TritonSumOfSquares(const Floats<8>& x) {
  float sum = __fmaf_rn(x.v[0], x.v[0], __fmul_rn(x.v[1], x.v[1]));
#pragma unroll
  for (int i = 2; i < 8; ++i) sum = __fmaf_rn(x.v[i], x.v[i], sum);
#pragma unroll
  for (int distance = kLanes / 2; distance >= 1; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, distance));
  }
  return sum;
}

}  // namespace lockstep::cuda

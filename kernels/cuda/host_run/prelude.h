// What a kernel's source needs to be compiled as C++: the words of CUDA, its arithmetic, and a block's shared memory.
// The first include of a file that goes on to include a .cu file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels/cuda/host_run/host_run.h"
#include "kernels/oracle/special_functions.h"

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__
#define blockIdx (::lockstep::host_run::BlockIdx())
#define gridDim (::lockstep::host_run::GridDim())
#define threadIdx (::lockstep::host_run::ThreadIdx())

namespace lockstep::cuda {
namespace {

constexpr size_t kMostSharedBytes = 227 << 10;
alignas(1024) std::byte raw[kMostSharedBytes];  // this file's kernels' `extern __shared__ ... raw[]`

}  // namespace

inline int min(int a, int b) {
  return std::min(a, b);
}
inline int max(int a, int b) {
  return std::max(a, b);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}

// CUDA's, not the C library's.
inline float expf(float x) {
  return oracle::Exp(x);
}
inline float log1pf(float x) {
  return oracle::Log1p(x);
}
inline float rsqrtf(float x) {
  return oracle::Rsqrt(x);
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class T>
T __ldcs(const T* from) {
  return *from;
}

inline void __syncthreads() {
  host_run::BlockBarrier(0, host_run::Threads());
}
inline void __syncwarp() {
  std::byte nothing = {};
  host_run::Collective("syncwarp", &nothing, 0, &nothing, 0, [](const std::byte*, std::byte*) {});
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  // Every lane names its own source.
  struct {
    T value;
    int lane;
  } lane_and_value = {value, lane & 31};
  host_run::Collective("shfl", &lane_and_value, sizeof(lane_and_value), &value, sizeof(value),
                       [](const std::byte* in, std::byte* out) {
                         for (int i = 0; i < 32; ++i) {
                           int from;
                           std::memcpy(&from, in + host_run::kLaneBytes * i + sizeof(T), sizeof(from));
                           std::memcpy(out + host_run::kLaneBytes * i, in + host_run::kLaneBytes * from, sizeof(T));
                         }
                       });
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}

}  // namespace lockstep::cuda

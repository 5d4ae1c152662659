// sum of expf(y - max) over a row in the order of PyTorch's log_softmax on a GPU. Device code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/sampling/cluster.cuh"
#include "kernels/cuda/sampling/row_math.cuh"
#include "kernels/cuda/sampling/row_reader.cuh"

namespace lockstep::cuda {

// PyTorch takes one of four kernels by the width of an fp32 row. All rows count as 16-byte aligned, as the rows of a
// contiguous [rows, vocab] tensor are where 4 divides vocab; elsewhere a row that is not has another order there.
enum class LogSumOrder : int32_t {
  kWarp,       // a warp a row: lane i % 32 takes element i
  kRegisters,  // 1024 threads: thread i % 1024 takes element i
  kShared,     // 1024 threads, 4 neighbours at a time
  kVector,     // the same in whole strides of 4096; the rest one by one
};

inline constexpr int kLogSumThreads = 1024;
inline constexpr int kLogSumVector = 4;
inline constexpr int kLogSumStride = kLogSumThreads * kLogSumVector;

// Which of RAW and TEMPERATURE are summed.
struct LogSumState {
  float max_raw = 0, max_temperature = 0;
  TemperatureScale scale;
  float raw = 0, temperature = 0;
};

template <bool kRaw, bool kTemperature>
__device__ inline void AddTerm(float x, LogSumState& s) {
  if constexpr (kRaw) s.raw = __fadd_rn(s.raw, expf(__fsub_rn(x, s.max_raw)));
  if constexpr (kTemperature) {
    s.temperature = __fadd_rn(s.temperature, expf(__fsub_rn(s.scale.Apply(x), s.max_temperature)));
  }
}

// The terms of PyTorch's thread `thread`, in its order.
template <bool kRaw, bool kTemperature>
__device__ void AddThreadTerms(const RowReader& row, LogSumOrder order, int thread, LogSumState& s) {
  const int vocab = row.vocab;
  int single = 0;  // from here on one by one
  if (order == LogSumOrder::kVector) single = vocab - vocab % kLogSumStride;
  if (order == LogSumOrder::kShared) single = vocab;
#pragma unroll 4
  for (int i = thread * kLogSumVector; i < single; i += kLogSumStride) {
    float v[kLogSumVector];
    row.LoadFour(i, v);
#pragma unroll
    for (int j = 0; j < kLogSumVector; ++j) AddTerm<kRaw, kTemperature>(v[j], s);
  }
  for (int i = single + thread; i < vocab; i += kLogSumThreads) AddTerm<kRaw, kTemperature>(row.At(i), s);
}

// Lane 0 has the sum.
__device__ inline float TreeSum(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    v = __fadd_rn(v, __shfl_down_sync(kAllLanes, v, distance));
  }
  return v;
}

// PyTorch's kernel for short rows, on this warp. Rows under 17 elements use that many lanes, rounded up to a power of
// two. All lanes have the sum: addition commutes.
template <bool kRaw, bool kTemperature>
__device__ void WarpLogSum(const RowReader& row, LogSumState& s) {
  const int vocab = row.vocab;
  int lanes = kWarp;
  while (lanes / 2 >= vocab && lanes > 1) lanes /= 2;
  if (Lane() < lanes) {
    for (int i = Lane(); i < vocab; i += lanes) AddTerm<kRaw, kTemperature>(row.At(i), s);
  }
  for (int distance = lanes / 2; distance >= 1; distance /= 2) {
    s.raw = __fadd_rn(s.raw, __shfl_xor_sync(kAllLanes, s.raw, distance));
    s.temperature = __fadd_rn(s.temperature, __shfl_xor_sync(kAllLanes, s.temperature, distance));
  }
}

struct LogSumShared {
  float raw[kLogSumThreads / kWarp];
  float temperature[kLogSumThreads / kWarp];
};

// On return lane 0 of the first warp of block 0 has both sums. PyTorch's 1024 threads are shared out over the blocks
// by warps.
template <int kBlocks, bool kRaw, bool kTemperature>
__device__ void LogSum(const RowReader& row, LogSumOrder order, LogSumShared* shared, LogSumState& s) {
  using Cluster = TaskCluster<kBlocks>;
  if (order == LogSumOrder::kWarp) {
    if (Cluster::rank() == 0 && WarpIndex() == 0) WarpLogSum<kRaw, kTemperature>(row, s);
    return;
  }
  constexpr int kThreads = kLogSumThreads / kBlocks;
  if (threadIdx.x < kThreads) {
    const int thread = Cluster::rank() * kThreads + static_cast<int>(threadIdx.x);
    AddThreadTerms<kRaw, kTemperature>(row, order, thread, s);
    s.raw = TreeSum(s.raw);
    s.temperature = TreeSum(s.temperature);
    if (Lane() == 0) {
      Cluster::Of(0, shared)->raw[thread / kWarp] = s.raw;
      Cluster::Of(0, shared)->temperature[thread / kWarp] = s.temperature;
    }
  }
  Cluster::Sync();
  if (Cluster::rank() == 0 && WarpIndex() == 0) {
    s.raw = TreeSum(shared->raw[Lane()]);
    s.temperature = TreeSum(shared->temperature[Lane()]);
  }
}

}  // namespace lockstep::cuda

#include <cstddef>

#include "kernels/cuda/params.h"
#include "kernels/cuda/sampling/cluster.cuh"
#include "kernels/cuda/sampling/log_sum.cuh"
#include "kernels/cuda/sampling/row_math.cuh"
#include "kernels/cuda/sampling/row_reader.cuh"
#include "kernels/cuda/sampling/sample_rows.h"
#include "kernels/cuda/sampling/select.cuh"
#include "sampler/mass.h"

namespace lockstep::cuda {
namespace {

static_assert(int64_t{kMaxSegments} * kSegmentIds == kMaxVocabSize);

// PyTorch's choice of kernel for fp32 rows (aten/src/ATen/native/cuda/SoftMax.cu).
LogSumOrder ChooseLogSumOrder(int64_t vocab) {
  constexpr int64_t kWarpWidth = 2048;
  constexpr int64_t kRegisterWidth = 9 * 1024;
  constexpr int64_t kSharedWidth = (48 * 1024 - 32 * 4) / 4;
  if (vocab <= kWarpWidth) return LogSumOrder::kWarp;
  if (vocab <= kRegisterWidth) return LogSumOrder::kRegisters;
  if (vocab < kSharedWidth && vocab % kLogSumVector == 0) return LogSumOrder::kShared;
  return LogSumOrder::kVector;
}

struct Shared {
  SelectShared select;
  LogSumShared log_sum;
  DeviceTask task;
  DeviceResult result;  // block 0's
  float warp_max[kBlockWarps];
  float block_max[2];  // of the row, of the adjusted row
  int32_t first;       // block 0's: the lowest id looked for
  int32_t list_counts[kSampleLists];
};

// The largest logit; +inf where one is NaN or +inf. `use`: 0 or 1, once each.
template <int kBlocks>
__device__ float FindMax(const RowReader& row, int use, Shared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  float max = MinusInfinity();
  bool valid = true;
  ForEachSegment<kBlocks>(row, [&](int, const float(&x)[kLaneIds]) {
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      valid = valid && x[i] <= kLargestFloat;  // false for NaN
      max = fmaxf(max, x[i]);
    }
  });
  max = WarpMax(valid ? max : -MinusInfinity());
  if (Lane() == 0) shared.warp_max[WarpIndex()] = max;
  __syncthreads();
  if (WarpIndex() == 0) {
    max = WarpMax(shared.warp_max[Lane()]);
    if (Lane() == 0) shared.block_max[use] = max;
  }
  Cluster::Sync();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
    max = fmaxf(b == 0 ? MinusInfinity() : max, *Cluster::Of(b, &shared.block_max[use]));
  return max;
}

// The lowest id for which pred(x) holds; INT32_MAX if none. Once per task.
template <int kBlocks, class Predicate>
__device__ int FindFirst(const RowReader& row, const Predicate& pred, Shared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  int first = INT32_MAX;
  ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
#pragma unroll
    for (int i = kLaneIds - 1; i >= 0; --i) {
      if (pred(x[i])) first = min(first, RowReader::FirstId(segment) + i);
    }
  });
  if (first != INT32_MAX) atomicMin(Cluster::Of(0, &shared.first), first);
  Cluster::Sync();
  return *Cluster::Of(0, &shared.first);
}

template <int kBlocks>
__device__ void Fail(SampleStatus status, int token, float value, Shared& shared) {
  if (TaskCluster<kBlocks>::rank() == 0 && threadIdx.x == 0) {
    shared.result.status = status;
    shared.result.token = token == INT32_MAX ? 0 : token;
    shared.result.bad_value = value;
  }
}

// Masses of the tokens kept, by segment, into block 0's shared.select.segment; their bits, if asked for.
template <int kBlocks, bool kAll>
__device__ void WeighSegments(const RowReader& row, float max, const Kept& kept, uint8_t* kept_bits, Shared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
    MassSum sum;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float y = row.Scaled(x[i]);
      float weight = Weight(__fsub_rn(y, max));
      bool keeps = y != MinusInfinity();
      if constexpr (!kAll) {
        keeps = keeps && kept.Rank(row.Key(x[i], y), RowReader::FirstId(segment) + i) && weight >= kept.min_p;
        weight = keeps ? weight : 0.0f;
      }
      sum.Add(weight);
      bits |= keeps ? 1u << i : 0u;
    }
    sum.RemoveBias(kLaneIds);
    sum.high = __reduce_add_sync(kAllLanes, sum.high);
    sum.low = __reduce_add_sync(kAllLanes, sum.low);
    if (Lane() == 0) Cluster::Of(0, &shared.select)->segment[segment] = sum.Total();
    if (kept_bits != nullptr) kept_bits[segment * kWarp + Lane()] = static_cast<uint8_t>(bits);
  });
  Cluster::Sync();
}

// By the first warp of block 0: the total of the segments' masses.
__device__ uint64_t TotalOfSegments(const SelectShared& shared, int segments) {
  uint64_t sum = 0;
  for (int s = Lane(); s < segments; s += kWarp) sum += shared.segment[s];
  return __shfl_sync(kAllLanes, WarpPrefixSum(sum), kWarp - 1);
}

// By the first warp of block 0: the first token, in ascending id, at which the running mass exceeds
// floor(draw * total / 2^53).
__device__ int Draw(const RowReader& row, float max, const Kept& kept, uint64_t total, uint64_t draw,
                    const SelectShared& shared) {
  uint64_t needed = (__umul64hi(draw, total) << 11 | (draw * total) >> 53) + 1;
  const int segment = FindSegment(shared, row.segments(), needed);
  float x[kLaneIds];
  row.Unpack(segment, row.Load(segment), x);
  uint64_t mass[kLaneIds];
#pragma unroll
  for (int i = 0; i < kLaneIds; ++i) {
    const float y = row.Scaled(x[i]);
    const float weight = Weight(__fsub_rn(y, max));
    const bool keeps = kept.Rank(row.Key(x[i], y), RowReader::FirstId(segment) + i) && weight >= kept.min_p;
    mass[i] = keeps ? MassOf(weight) : 0;
  }
  return segment * kSegmentIds + FindInSegment(mass, needed);
}

// The task.list_size most probable tokens of those kept, into the task's list `list`.
template <int kBlocks>
__device__ void ListMostProbable(const RowReader& row, float max, const Kept& kept, SampleList list, Shared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  const int size = shared.task.list_size;
  uint64_t* const to = shared.task.lists + static_cast<int64_t>(list) * size;
  const Kept listed = Select<kBlocks, Amount::kCount>(row, max, kept, size, 0, shared.select);
  ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float y = row.Scaled(x[i]);
      const int id = RowReader::FirstId(segment) + i;
      if (y == MinusInfinity() || !listed.Rank(row.Key(x[i], y), id)) continue;
      if (listed.min_p != 0.0f && Weight(__fsub_rn(y, max)) < listed.min_p) continue;
      const int place = atomicAdd(&Cluster::Of(0, &shared)->list_counts[list], 1);
      to[place] = static_cast<uint64_t>(__float_as_uint(y)) << 32 | static_cast<uint32_t>(id);
    }
  });
  Cluster::Sync();
}

// RAW's and TEMPERATURE's sums into block 0's result.
template <int kBlocks>
__device__ void SumLogits(const SampleRowsParams& params, const RowReader& row, LogSumOrder order, float max,
                          Shared& shared) {
  const DeviceTask& task = shared.task;
  LogSumState state;
  state.scale = {{task.temperature, task.inverse}, params.temperature_rounding};
  state.max_raw = max;
  state.max_temperature = state.scale.Apply(max);
  const bool raw = (task.flags & kSampleRaw) != 0;
  const bool temperature = (task.flags & kSampleTemperature) != 0;
  if (raw && temperature) {
    LogSum<kBlocks, true, true>(row, order, &shared.log_sum, state);
  } else if (raw) {
    LogSum<kBlocks, true, false>(row, order, &shared.log_sum, state);
  } else if (temperature) {
    LogSum<kBlocks, false, true>(row, order, &shared.log_sum, state);
  }
  if (TaskCluster<kBlocks>::rank() == 0 && threadIdx.x == 0) {
    if (raw) shared.result.log_sum_raw = logf(state.raw);
    if (temperature) shared.result.log_sum_temperature = logf(state.temperature);
  }
}

// Filters, masses, draw and list over y = row / T, whose maximum is `max`.
template <int kBlocks>
__device__ void SampleProcessed(const RowReader& row, float max, Shared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  const DeviceTask& task = shared.task;
  const bool first_warp = Cluster::rank() == 0 && WarpIndex() == 0;
  if (threadIdx.x == 0) shared.result.max_processed = max;
  if ((task.flags & kSampleGreedy) != 0) {
    const int argmax = FindFirst<kBlocks>(
        row, [&](float x) { return x == max; }, shared);
    if (first_warp && Lane() == 0) {
      shared.result.argmax = argmax;
      if (task.token < 0) shared.result.token = argmax;
    }
    return;
  }

  Kept kept;
  if (task.top_k > 0) kept = Select<kBlocks, Amount::kCount>(row, max, kept, task.top_k, 0, shared.select);
  if (task.top_p > 0) kept = Select<kBlocks, Amount::kMass>(row, max, kept, 0, task.top_p, shared.select);
  kept.min_p = task.min_p;
  if (task.top_k > 0 || task.top_p > 0 || task.min_p > 0.0f) {
    WeighSegments<kBlocks, false>(row, max, kept, task.kept, shared);
  } else {
    WeighSegments<kBlocks, true>(row, max, kept, task.kept, shared);
  }
  if (first_warp) {
    const uint64_t total = TotalOfSegments(shared.select, row.segments());
    int token = task.token;
    if (token < 0) token = Draw(row, max, kept, total, task.draw, shared.select);
    if (Lane() == 0) {
      const float x = row.At(token);
      const float y = row.Scaled(x);
      const bool keeps = kept.Rank(row.Key(x, y), token) && Weight(__fsub_rn(y, max)) >= kept.min_p;
      shared.result.token = token;
      shared.result.mass = total;
      shared.result.processed = keeps ? y : MinusInfinity();
    }
  }
  if ((task.flags & kSampleListProcessed) != 0) {
    // The list's selection writes block 0's segments, which the draw reads.
    Cluster::Sync();
    ListMostProbable<kBlocks>(row, max, kept, kListProcessed, shared);
  }
}

template <int kBlocks>
__device__ void SampleTaskRow(const SampleRowsParams& params, LogSumOrder order, Shared& shared) {
  const DeviceTask& task = shared.task;
  RowReader row;
  row.data = static_cast<const std::byte*>(params.logits) + task.row * params.logits_stride * (params.fp32 ? 4 : 2);
  row.fp32 = params.fp32;
  row.vocab = static_cast<int32_t>(params.vocab);
  row.scale.divisor = {task.temperature, task.inverse};
  const bool scaled = task.temperature != 1.0f;
  const bool processed = (task.flags & kSampleProcessed) != 0;
  const bool adjusted = processed && task.adjusted != nullptr;

  const float max = FindMax<kBlocks>(row, 0, shared);
  const auto not_finite = [](float y) { return !(y <= kLargestFloat); };
  if (not_finite(max)) {
    const int first = FindFirst<kBlocks>(row, not_finite, shared);
    return Fail<kBlocks>(SampleStatus::kLogitNotFinite, first, row.At(first), shared);
  }
  if (max == MinusInfinity()) return Fail<kBlocks>(SampleStatus::kRowEmpty, 0, max, shared);
  if (threadIdx.x == 0) {
    shared.result.max_logit = max;
    if (task.token >= 0) shared.result.token = task.token;
  }

  const TemperatureScale temperature = {row.scale.divisor, params.temperature_rounding};
  if (scaled && ((task.flags & kSampleTemperature) != 0 || (processed && !adjusted))) {
    const auto overflows = [&](float x) { return not_finite(row.scale.Apply(x)) || not_finite(temperature.Apply(x)); };
    if (overflows(max)) {
      const int first = FindFirst<kBlocks>(row, overflows, shared);
      return Fail<kBlocks>(SampleStatus::kScaledNotFinite, first, -MinusInfinity(), shared);
    }
    if (row.scale.Apply(max) == MinusInfinity()) return Fail<kBlocks>(SampleStatus::kNothingLeft, 0, max, shared);
  }
  if ((task.flags & (kSampleRaw | kSampleTemperature)) != 0) SumLogits<kBlocks>(params, row, order, max, shared);

  if (processed) {
    RowReader drawn = row;
    drawn.scaled = scaled;
    float drawn_max = max;
    if (adjusted) {
      drawn.data = task.adjusted;
      drawn.fp32 = true;
      drawn_max = FindMax<kBlocks>(drawn, 1, shared);
    }
    // Division rounds monotonically: the largest logit has the largest quotient.
    drawn_max = drawn.Scaled(drawn_max);
    if (not_finite(drawn_max)) {
      const int first = FindFirst<kBlocks>(
          drawn, [&](float x) { return not_finite(drawn.Scaled(x)); }, shared);
      return Fail<kBlocks>(SampleStatus::kAdjustedNotFinite, first, drawn.Scaled(drawn.At(first)), shared);
    }
    if (drawn_max == MinusInfinity()) return Fail<kBlocks>(SampleStatus::kNothingLeft, 0, drawn_max, shared);
    SampleProcessed<kBlocks>(drawn, drawn_max, shared);
  }

  if ((task.flags & kSampleListRaw) != 0) {
    TaskCluster<kBlocks>::Sync();
    ListMostProbable<kBlocks>(row, max, Kept(), kListRaw, shared);
  }
  if ((task.flags & kSampleListTemperature) != 0) {
    TaskCluster<kBlocks>::Sync();
    row.scaled = true;
    row.scale = temperature;
    ListMostProbable<kBlocks>(row, temperature.Apply(max), Kept(), kListTemperature, shared);
  }
  __syncthreads();
  if (TaskCluster<kBlocks>::rank() == 0 && threadIdx.x == 0) shared.result.logit = row.At(shared.result.token);
}

// Grid: (count * kBlocks), 1024 threads, a cluster of kBlocks blocks a task.
// Traffic: the row, 2 bytes a logit, from memory or L2 once and from L1 for every further pass: two passes for a
// draw (maximum, masses), one more for RAW and TEMPERATURE together, four or five more for each of top_k and top_p.
template <int kBlocks>
__global__ void __launch_bounds__(kBlockThreads)
    SampleRowsKernel(const __grid_constant__ SampleRowsParams params, LogSumOrder order) {
  __shared__ Shared shared;
  using Cluster = TaskCluster<kBlocks>;
  const int index = static_cast<int>(blockIdx.x) / kBlocks;
  if (threadIdx.x == 0) {
    shared.task = params.tasks[index];
    shared.result = DeviceResult();
    shared.first = INT32_MAX;
    for (int l = 0; l < kSampleLists; ++l) shared.list_counts[l] = 0;
  }
  Cluster::Sync();
  SampleTaskRow<kBlocks>(params, order, shared);
  Cluster::Sync();  // no block's shared memory goes away while another may read it
  if (Cluster::rank() == 0 && threadIdx.x == 0) {
    for (int l = 0; l < kSampleLists; ++l) shared.result.list_counts[l] = shared.list_counts[l];
    params.results[index] = shared.result;
  }
}

template <int kBlocks>
absl::Status Launch(const SampleRowsParams& params, cudaStream_t stream) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.count * kBlocks));
  config.blockDim = dim3(kBlockThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = kBlocks > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, SampleRowsKernel<kBlocks>, params, ChooseLogSumOrder(params.vocab));
  return LaunchStatus("SampleRows");
}

}  // namespace

absl::Status LaunchSampleRows(const SampleRowsParams& params, int blocks_per_task, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.count == 0) return absl::OkStatus();
  switch (blocks_per_task) {
    case 1:
      return Launch<1>(params, stream);
    case 2:
      return Launch<2>(params, stream);
    case 4:
      return Launch<4>(params, stream);
    case 8:
      return Launch<8>(params, stream);
    default:
      return BadField("blocks_per_task", blocks_per_task, "1, 2, 4 or 8");
  }
}

}  // namespace lockstep::cuda

#include <cuda_bf16.h>

#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/sampling/adjust_rows.h"

namespace lockstep::cuda {
namespace {

constexpr int kAdjustThreads = 512;
constexpr int kAdjustSlices = 16;  // of a row's columns, a block each

__device__ float LogitAt(const SampleRowsParams& params, const DeviceTask& task, int column) {
  const int64_t at = task.row * params.logits_stride + column;
  return params.fp32 ? static_cast<const float*>(params.logits)[at]
                     : __bfloat162float(static_cast<const __nv_bfloat16*>(params.logits)[at]);
}

__device__ float MaskedLogit() {
  return __uint_as_float(0xFF800000u);  // -inf
}

__device__ bool IsAllowed(const DeviceTask& task, int token) {
  return task.allowed == nullptr || (task.allowed[token / 32] >> token % 32 & 1) != 0;
}

__device__ float Penalized(const DeviceTask& task, int generated, float x) {
  x = x > 0 ? __fdiv_rn(x, task.repetition_penalty) : __fmul_rn(x, task.repetition_penalty);
  if (generated == 0) return x;
  x = __fsub_rn(x, __fmul_rn(task.frequency_penalty, static_cast<float>(generated)));
  return __fsub_rn(x, task.presence_penalty);
}

// Index of the first bias of a token that is not below `token`.
__device__ int FirstBias(const DeviceTask& task, int token) {
  int begin = 0, end = task.bias_count;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (task.biases[middle].token < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Grid: (slices, count), 512 threads. Traffic: 2 or 4 bytes read and 4 written a logit, a bit a token if some alone are
// allowed, biases once, the step's penalties and masked tokens once a slice. A task without `adjusted` costs nothing.
__global__ void __launch_bounds__(kAdjustThreads) AdjustRowsKernel(const __grid_constant__ SampleRowsParams params) {
  const DeviceTask& task = params.tasks[blockIdx.y];
  float* const out = task.adjusted;
  if (out == nullptr) return;
  const int vocab = static_cast<int>(params.vocab);
  const int width = (vocab + kAdjustSlices - 1) / kAdjustSlices;
  const int begin = static_cast<int>(blockIdx.x) * width;
  const int end = min(begin + width, vocab);
  const int thread = static_cast<int>(threadIdx.x);
  // Masks come last in sampler/README.md; what is -inf stays so whatever finite numbers are added and multiplied.
  for (int c = begin + thread; c < end; c += kAdjustThreads) {
    out[c] = IsAllowed(task, c) ? LogitAt(params, task, c) : MaskedLogit();
  }
  __syncthreads();  // here and below: a token's column may have been another thread's
  for (int i = thread; i < task.penalty_count; i += kAdjustThreads) {
    const TokenPenalty penalty = task.penalties[i];
    if (penalty.token >= begin && penalty.token < end) {
      out[penalty.token] = Penalized(task, penalty.generated, out[penalty.token]);
    }
  }
  __syncthreads();
  for (int i = FirstBias(task, begin) + thread; i < task.bias_count; i += kAdjustThreads) {
    const TokenBias bias = task.biases[i];
    if (bias.token >= end) break;
    out[bias.token] = __fadd_rn(out[bias.token], bias.bias);
  }
  __syncthreads();
  for (int i = thread; i < task.masked_count; i += kAdjustThreads) {
    const int token = task.masked[i];
    if (token >= begin && token < end) out[token] = MaskedLogit();
  }
}

}  // namespace

absl::Status LaunchAdjustRows(const SampleRowsParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxTasks = 65535;  // of grid y
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.count > kMaxTasks) return BadField("SampleRowsParams.count", params.count, "at most 65535");
  if (params.count == 0) return absl::OkStatus();
  return LaunchKernel("AdjustRows", AdjustRowsKernel, dim3(kAdjustSlices, static_cast<unsigned>(params.count)),
                      kAdjustThreads, 0, LaunchOrder::kAfter, stream, params);
}

}  // namespace lockstep::cuda

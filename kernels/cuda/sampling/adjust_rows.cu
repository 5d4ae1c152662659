#include <cuda_bf16.h>

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

__device__ float Edited(const DeviceTask& task, const LogitEdit& edit, float x) {
  if ((edit.flags & kEditRepeated) != 0) {
    x = x > 0 ? __fdiv_rn(x, task.repetition_penalty) : __fmul_rn(x, task.repetition_penalty);
    if (edit.generated > 0) {
      x = __fsub_rn(x, __fmul_rn(task.frequency_penalty, static_cast<float>(edit.generated)));
      x = __fsub_rn(x, task.presence_penalty);
    }
  }
  if ((edit.flags & kEditBiased) != 0) x = __fadd_rn(x, edit.bias);
  const bool masked = (edit.flags & kEditMasked) != 0 || (task.allow_only != 0 && (edit.flags & kEditAllowed) == 0);
  return masked ? __uint_as_float(0xFF800000u) : x;
}

// Grid: (slices, count), 512 threads. Traffic: 2 or 4 bytes read and 4 written a logit, and the task's edits once a
// slice. A task without `adjusted` costs nothing.
__global__ void __launch_bounds__(kAdjustThreads) AdjustRowsKernel(const __grid_constant__ SampleRowsParams params) {
  const DeviceTask& task = params.tasks[blockIdx.y];
  float* const out = task.adjusted;
  if (out == nullptr) return;
  const int vocab = static_cast<int>(params.vocab);
  const int width = (vocab + kAdjustSlices - 1) / kAdjustSlices;
  const int begin = static_cast<int>(blockIdx.x) * width;
  const int end = min(begin + width, vocab);
  for (int c = begin + static_cast<int>(threadIdx.x); c < end; c += kAdjustThreads) {
    out[c] = task.allow_only != 0 ? __uint_as_float(0xFF800000u) : LogitAt(params, task, c);
  }
  __syncthreads();  // an edit's column may be another thread's
  for (int i = static_cast<int>(threadIdx.x); i < task.edit_count; i += kAdjustThreads) {
    const LogitEdit edit = task.edits[i];
    if (edit.token >= begin && edit.token < end) {
      out[edit.token] = Edited(task, edit, LogitAt(params, task, edit.token));
    }
  }
}

}  // namespace

absl::Status LaunchAdjustRows(const SampleRowsParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxTasks = 65535;  // of grid y
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.count > kMaxTasks) return BadField("SampleRowsParams.count", params.count, "at most 65535");
  if (params.count == 0) return absl::OkStatus();
  AdjustRowsKernel<<<dim3(kAdjustSlices, static_cast<unsigned>(params.count)), kAdjustThreads, 0, stream>>>(params);
  return LaunchStatus("AdjustRows");
}

}  // namespace lockstep::cuda

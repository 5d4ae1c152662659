// The CUDA backend's RowSampler: sampler/README.md on the device, whole. Logits never leave it; what comes back is a
// few numbers a task.
//
// Tokens, kept ids, order of lists and PROCESSED are the CPU sampler's exactly: masses are the same integers. RAW and
// TEMPERATURE are the trainer's instead: (y - max) - logf(sum of expf(y - max)) in fp32, in the order in which
// PyTorch's log_softmax sums an fp32 row on a GPU (log_sum.cuh), whatever the batch. TEMPERATURE's y is x * (1 / T)
// where the trainer divides by a Python number; the draw takes x / T always.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/cuda/sampling/device_task.h"
#include "sampler/row_sampler.h"

namespace lockstep::cuda {

struct DeviceSamplerOptions {
  int64_t vocab = 0;  // 1 to 262144
  TemperatureRounding temperature_rounding = TemperatureRounding::kReciprocal;
  cudaStream_t stream = nullptr;  // the logits' stream; all work is enqueued on it
};

// Rows given to Enqueue: bf16 or fp32, 16-byte aligned, stride a multiple of 8 elements. Enqueue waits for nothing once
// its buffers have grown to the largest step; Collect waits for one event.
absl::StatusOr<std::unique_ptr<RowSampler>> MakeDeviceSampler(const DeviceSamplerOptions& options);

}  // namespace lockstep::cuda

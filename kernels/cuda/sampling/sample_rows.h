// From rows of logits to tokens and to what their log-probabilities are made of: one launch for any number of tasks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/sampling/device_task.h"

namespace lockstep::cuda {

struct SampleRowsParams {
  const void* logits = nullptr;  // [rows, vocab], bf16 or fp32; 16-byte aligned rows
  bool fp32 = false;
  int64_t logits_stride = 0;          // elements, a multiple of 8; a row is read up to the multiple of 8 after vocab
  const DeviceTask* tasks = nullptr;  // [count]
  DeviceResult* results = nullptr;    // [count]
  int64_t count = 0;
  int64_t vocab = 0;
  TemperatureRounding temperature_rounding = TemperatureRounding::kReciprocal;

  absl::Status Validate() const;
};

// Blocks that share a task, so that `count` tasks spread over `multiprocessors`: 1, 2, 4 or 8. No result depends on it.
int SampleBlocksPerTask(int64_t count, int multiprocessors);

// Asynchronous on `stream`. `blocks_per_task`: as above.
absl::Status LaunchSampleRows(const SampleRowsParams& params, int blocks_per_task, cudaStream_t stream);

}  // namespace lockstep::cuda

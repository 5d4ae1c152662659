// The CUDA backend's RowSampler: sampler/README.md on the device, whole. Logits never leave it; what comes back is a
// few numbers a task.
//
// Tokens, kept ids, order of lists and PROCESSED are the CPU sampler's exactly: masses are the same integers. RAW and
// TEMPERATURE are the trainer's instead: (y - max) - logf(sum of expf(y - max)) in fp32, in the order in which
// PyTorch's log_softmax sums an fp32 row on a GPU (log_sum.cuh), whatever the batch. TEMPERATURE's y is x * (1 / T)
// where the trainer divides by a Python number; the draw takes x / T always.
//
// A request's allowed_token_ids and logit_bias are packed and sent at the first step that samples from it and stay on
// the device until Forget; its samples share them. What penalties, bad_words and min_tokens say changes with the
// tokens, so it comes with every step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/cuda/sampling/device_task.h"
#include "sampler/row_sampler.h"

namespace lockstep::cuda {

struct DeviceSamplerOptions {
  int64_t vocab = 0;     // 1 to 262144
  int64_t requests = 0;  // that have token lists, of one step at most
  TemperatureRounding temperature_rounding = TemperatureRounding::kReciprocal;
  cudaStream_t stream = nullptr;  // the logits' stream; all work is enqueued on it
};

// Device memory that the sampler holds from the start for each of DeviceSamplerOptions::requests.
int64_t DeviceSamplerBytesPerRequest(int64_t vocab);

// RESOURCE_EXHAUSTED without that memory. Rows given to Enqueue: bf16 or fp32, 16-byte aligned, stride a multiple of 8
// elements. Enqueue waits for nothing once its buffers have grown to the largest step; Collect waits for one event.
absl::StatusOr<std::unique_ptr<RowSampler>> MakeDeviceSampler(const DeviceSamplerOptions& options);

}  // namespace lockstep::cuda

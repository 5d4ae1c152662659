// Penalties, bias and masks: steps 1 to 4 of sampler/README.md on the device, into fp32 rows of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "kernels/cuda/sampling/sample_rows.h"

namespace lockstep::cuda {

// Fills `adjusted` of every task of `params` that has one. Asynchronous on `stream`.
absl::Status LaunchAdjustRows(const SampleRowsParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

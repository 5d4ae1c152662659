// Rows of a bf16 embedding table by token.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// out[r] = table[tokens[r]]. Strides in elements.
struct EmbeddingParams {
  const int32_t* tokens = nullptr;       // [rows], each in [0, vocab): another value traps on the device
  const __nv_bfloat16* table = nullptr;  // [vocab, hidden], rows side by side
  __nv_bfloat16* out = nullptr;          // [rows, hidden]
  int64_t rows = 0;
  int64_t vocab = 0;
  int64_t hidden = 0;
  int64_t out_stride = 0;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

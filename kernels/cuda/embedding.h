// Rows of an embedding table by token.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// out[r] = table[tokens[r]]. Strides in elements.
struct EmbeddingParams {
  const int32_t* tokens = nullptr;  // [rows], each in [0, vocab): another value traps on the device
  const void* table = nullptr;      // [vocab, hidden] of table_dtype, rows side by side
  void* out = nullptr;              // [rows, hidden] of out_dtype
  int64_t rows = 0;
  int64_t vocab = 0;
  int64_t hidden = 0;
  int64_t out_stride = 0;
  // Both bf16, or out fp32 and the table either.
  DType table_dtype = DType::kBF16;
  DType out_dtype = DType::kBF16;

  absl::Status Validate() const;
};

// Asynchronous on `stream`. Zero rows are no work.
absl::Status LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

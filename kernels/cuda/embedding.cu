#include "kernels/cuda/embedding.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kVector = sizeof(uint4) / sizeof(__nv_bfloat16);

// Grid: (rows), 128 threads, a block a row.
// Traffic: 4 bytes an element (a table row read, an output row written) and 4 bytes a token.
__global__ void __launch_bounds__(kThreads) EmbeddingKernel(const __grid_constant__ EmbeddingParams params) {
  FollowPreviousKernel();
  const int64_t row = blockIdx.x;
  const int64_t token = params.tokens[row];
  if (token < 0 || token >= params.vocab) __trap();
  const uint4* from = reinterpret_cast<const uint4*>(params.table + token * params.hidden);
  uint4* to = reinterpret_cast<uint4*>(params.out + row * params.out_stride);
  for (int64_t i = threadIdx.x; i < params.hidden / kVector; i += kThreads) to[i] = from[i];
}

}  // namespace

absl::Status EmbeddingParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("EmbeddingParams.rows", rows, "0 to 2^31 - 1");
  if (vocab <= 0 || vocab > INT32_MAX) return BadField("EmbeddingParams.vocab", vocab, "1 to 2^31 - 1");
  if (hidden <= 0 || hidden % kVector != 0) return BadField("EmbeddingParams.hidden", hidden, "a multiple of 8");
  if (absl::Status status = CheckPointer("EmbeddingParams.tokens", tokens, sizeof(int32_t)); !status.ok())
    return status;
  if (absl::Status status = CheckPointer("EmbeddingParams.table", table, sizeof(uint4)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("EmbeddingParams.out", out, sizeof(uint4)); !status.ok()) return status;
  return CheckStride("EmbeddingParams.out_stride", out_stride, hidden, kVector);
}

absl::Status LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  return LaunchOverlapped("Embedding", EmbeddingKernel, static_cast<unsigned>(params.rows), kThreads, stream, params);
}

}  // namespace lockstep::cuda

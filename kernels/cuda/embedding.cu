#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;

// Grid: (rows), 128 threads, a block a row.
// Traffic: a table row read and an output row written, 4 bytes an element in bf16, and 4 bytes a token.
template <class Table, class Out>
__global__ void __launch_bounds__(kThreads) EmbeddingKernel(const __grid_constant__ EmbeddingParams params) {
  FollowPreviousKernel();
  const int64_t row = blockIdx.x;
  const int64_t token = params.tokens[row];
  if (token < 0 || token >= params.vocab) __trap();
  const Table* from = static_cast<const Table*>(params.table) + token * params.hidden;
  Out* to = static_cast<Out*>(params.out) + row * params.out_stride;
  for (int64_t i = threadIdx.x * kVector; i < params.hidden; i += kThreads * kVector) {
    const VectorOf<Table, kVector> values = Load<kVector>(from + i);
    if constexpr (std::is_same_v<Table, Out>) {
      Store(values, to + i);
    } else {
      Store(Unpack(values), to + i);
    }
  }
}

}  // namespace

absl::Status EmbeddingParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("EmbeddingParams.rows", rows, "0 to 2^31 - 1");
  if (vocab <= 0 || vocab > INT32_MAX) return BadField("EmbeddingParams.vocab", vocab, "1 to 2^31 - 1");
  if (hidden <= 0 || hidden % kVector != 0) return BadField("EmbeddingParams.hidden", hidden, "a multiple of 8");
  if (absl::Status status = CheckBf16OrF32("EmbeddingParams.table_dtype", table_dtype); !status.ok()) return status;
  if (absl::Status status = CheckBf16OrF32("EmbeddingParams.out_dtype", out_dtype); !status.ok()) return status;
  if (out_dtype == DType::kBF16 && table_dtype != DType::kBF16) {
    return BadField("EmbeddingParams.table_dtype", "float32", "bfloat16 where out is");
  }
  if (absl::Status status = CheckPointer("EmbeddingParams.tokens", tokens, sizeof(int32_t)); !status.ok())
    return status;
  if (absl::Status status = CheckPointer("EmbeddingParams.table", table, sizeof(uint4)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("EmbeddingParams.out", out, sizeof(uint4)); !status.ok()) return status;
  return CheckStride("EmbeddingParams.out_stride", out_stride, hidden, kVector);
}

absl::Status LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  auto kernel = EmbeddingKernel<__nv_bfloat16, __nv_bfloat16>;
  if (params.out_dtype == DType::kF32) {
    kernel = params.table_dtype == DType::kF32 ? EmbeddingKernel<float, float> : EmbeddingKernel<__nv_bfloat16, float>;
  }
  return LaunchOverlapped("Embedding", kernel, static_cast<unsigned>(params.rows), kThreads, stream, params);
}

}  // namespace lockstep::cuda

// Causal attention over paged keys and values, head size 128, bit for bit as PyTorch's scaled_dot_product_attention
// computes it on Hopper. A row's bits depend on its query and on the keys and values before it only: decode and prefill
// give the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/kv_cache.h"

namespace lockstep::cuda {

// Which of PyTorch's backends: the order in which a row takes its keys, and the roundings of the exponent.
// transformers gives SDPA a mask, and so runs kCudnnMask for every row, in sliding layers when the whole forward has
// `window` tokens or more, and in all layers when the batch is padded; else it runs kCudnn.
enum class AttentionProgram {
  kCudnn,      // tiles of 128 keys, from key 0 forwards
  kFa2,        // tiles of 64 keys, from the diagonal backwards
  kCudnnMask,  // as kCudnn, scale and log2(e) multiplied one after the other: what cuDNN runs when given a mask
};

// Position i sees the keys j <= i, with a window j > i - window too. Query head h reads kv head
// h / (heads / kv_heads).
struct AttentionParams {
  AttentionProgram program = AttentionProgram::kCudnn;
  DeviceBatch batch;
  const __nv_bfloat16* q = nullptr;  // [rows, heads * 128]
  __nv_bfloat16* out = nullptr;      // [rows, heads * 128]; must not overlap q
  int64_t q_stride = 0;              // elements
  int64_t out_stride = 0;
  KvPages kv;          // holds the keys and values of every row of the batch already
  int64_t heads = 0;   // a multiple of kv.kv_heads
  int64_t window = 0;  // 0: every earlier key
  float scale = 0;     // of q k^T
  // For decode pieces too few to fill the card otherwise, and for those that batch.shares names:
  // AttentionWorkspaceBytes() for max_positions, or null: neither is done then, and the bits are the same. Undefined
  // contents; the kernels of one stream may share it.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  int64_t max_positions = 0;  // above every decode piece's position; used with a workspace only

  absl::Status Validate() const;
};

// Whether decode of so many pieces is spread over the card, given a workspace. Then, and only then, the launch depends
// on max_positions.
bool DecodeIsSpread(int64_t decode_pieces, int64_t heads, int64_t kv_heads);

// What lets few decode pieces of up to `max_positions` positions be spread over the whole card, or many take the keys
// and values of batch.shares together (with one query head a kv head, under the programs that go forwards). 0: neither.
int64_t AttentionWorkspaceBytes(const DeviceBatch& batch, int64_t heads, int64_t kv_heads, int64_t max_positions);

// Both kernels, decode pieces and tiles. Asynchronous on `stream`.
absl::Status LaunchAttention(const AttentionParams& params, cudaStream_t stream);

// The rows of pieces [0, decode_pieces).
absl::Status LaunchAttentionDecode(const AttentionParams& params, cudaStream_t stream);
// The rows of the tiles.
absl::Status LaunchAttentionPrefill(const AttentionParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

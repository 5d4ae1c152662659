// What the attention kernels are given; made from AttentionParams on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/batch.h"

namespace lockstep::cuda {

// Query heads of one kv head that one matrix product of a decode kernel takes.
constexpr int kDecodeColumns = 8;

// From a score to the power of two: the factors of attention's scale and of log2(e), together or one after the other.
struct ExponentScale {
  float folded;  // scale * log2(e)
  float scale;
  float log2e;
};

// What a row of attention has come to after some of its tiles, in memory: of one query head.
struct RowState {
  float o[kKvHeadDim];  // the output, not divided yet
  float sums[4];        // of the weights: each thread's of a quad
  float max;
  float unused[3];  // to whole 16 bytes
};

struct AttentionArgs {
  const std::byte* kv;  // the pages
  DeviceBatch batch;
  const __nv_bfloat16* q;
  __nv_bfloat16* out;
  int64_t q_stride;
  int64_t out_stride;
  int32_t page_rows;  // of 256 bytes
  int32_t page_size;
  int32_t kv_heads;
  int32_t group;  // query heads of a kv head
  int32_t window;
  ExponentScale exponent;
  RowState* shared_rows;  // [decode_pieces, heads]: after the tiles that pieces share; null: none are shared
};

AttentionArgs MakeAttentionArgs(const AttentionParams& params);

// Blocks of the decode kernels' first dimension: a kv head and up to 8 of its query heads each.
int64_t DecodeUnits(int64_t heads, int64_t kv_heads);

// What LaunchAttentionDecodeSpread needs: the tiles' scores.
int64_t SpreadWorkspaceBytes(int64_t decode_pieces, int64_t heads, int64_t kv_heads, int64_t max_positions);

// Decode with one sequence's keys spread over the card; needs params.workspace. The same bits.
absl::Status LaunchAttentionDecodeSpread(const AttentionParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

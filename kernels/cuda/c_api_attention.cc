// C functions of attention, its cache and rotary embedding. Arguments in the order of the parameter structs; those of
// DeviceBatch first.
#include <cuda_bf16.h>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/c_api.h"
#include "kernels/cuda/kv_cache.h"
#include "kernels/cuda/rope.h"

namespace {

using lockstep::cuda::CApiResult;

lockstep::cuda::KvPages Pages(void* base, int64_t page_count, int64_t page_bytes, int64_t page_size, int64_t kv_heads) {
  return {.base = static_cast<std::byte*>(base),
          .page_count = page_count,
          .page_bytes = page_bytes,
          .page_size = page_size,
          .kv_heads = kv_heads};
}

}  // namespace

extern "C" {

int lockstep_rope(const int32_t* positions, const int32_t* row_piece, int32_t rows, void* q, void* k,
                  const float* inv_freq, int64_t heads, int64_t kv_heads, int64_t q_stride, int64_t k_stride,
                  float attention_scaling, void* stream) {
  const lockstep::cuda::RopeParams params = {.batch = {.positions = positions, .row_piece = row_piece, .rows = rows},
                                             .q = static_cast<__nv_bfloat16*>(q),
                                             .k = static_cast<__nv_bfloat16*>(k),
                                             .inv_freq = inv_freq,
                                             .heads = heads,
                                             .kv_heads = kv_heads,
                                             .q_stride = q_stride,
                                             .k_stride = k_stride,
                                             .attention_scaling = attention_scaling};
  return CApiResult(lockstep::cuda::LaunchRope(params, static_cast<cudaStream_t>(stream)));
}

int lockstep_write_kv(const void* pieces, const int32_t* pages, const int32_t* positions, const int32_t* row_piece,
                      int32_t rows, const void* k, const void* v, int64_t k_stride, int64_t v_stride, void* base,
                      int64_t page_count, int64_t page_bytes, int64_t page_size, int64_t kv_heads, void* stream) {
  const lockstep::cuda::WriteKvParams params = {
      .batch = {.pieces = static_cast<const lockstep::cuda::DevicePiece*>(pieces),
                .pages = pages,
                .positions = positions,
                .row_piece = row_piece,
                .rows = rows},
      .k = static_cast<const __nv_bfloat16*>(k),
      .v = static_cast<const __nv_bfloat16*>(v),
      .k_stride = k_stride,
      .v_stride = v_stride,
      .kv = Pages(base, page_count, page_bytes, page_size, kv_heads)};
  return CApiResult(lockstep::cuda::LaunchWriteKv(params, static_cast<cudaStream_t>(stream)));
}

// program: 0 cuDNN's, 1 FlashAttention-2's.
int lockstep_attention(int32_t program, const void* pieces, const void* tiles, const int32_t* pages,
                       int32_t piece_count, int32_t decode_pieces, int32_t tile_count, const void* q, void* out,
                       int64_t q_stride, int64_t out_stride, void* base, int64_t page_count, int64_t page_bytes,
                       int64_t page_size, int64_t kv_heads, int64_t heads, int64_t window, float scale, void* workspace,
                       int64_t workspace_bytes, int64_t max_positions, void* stream) {
  const lockstep::cuda::AttentionParams params = {
      .program = static_cast<lockstep::cuda::AttentionProgram>(program),
      .batch = {.pieces = static_cast<const lockstep::cuda::DevicePiece*>(pieces),
                .tiles = static_cast<const lockstep::cuda::DeviceTile*>(tiles),
                .pages = pages,
                .piece_count = piece_count,
                .decode_pieces = decode_pieces,
                .tile_count = tile_count},
      .q = static_cast<const __nv_bfloat16*>(q),
      .out = static_cast<__nv_bfloat16*>(out),
      .q_stride = q_stride,
      .out_stride = out_stride,
      .kv = Pages(base, page_count, page_bytes, page_size, kv_heads),
      .heads = heads,
      .window = window,
      .scale = scale,
      .workspace = workspace,
      .workspace_bytes = workspace_bytes,
      .max_positions = max_positions};
  return CApiResult(lockstep::cuda::LaunchAttention(params, static_cast<cudaStream_t>(stream)));
}

int64_t lockstep_attention_workspace_bytes(int64_t decode_pieces, int64_t heads, int64_t kv_heads,
                                           int64_t max_positions) {
  lockstep::cuda::DeviceBatch batch;
  batch.decode_pieces = static_cast<int32_t>(decode_pieces);
  return lockstep::cuda::AttentionWorkspaceBytes(batch, heads, kv_heads, max_positions);
}

}  // extern "C"

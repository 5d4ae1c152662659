#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/c_api.h"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_prefill.h"
#include "kernels/cuda/gdn_state.h"

namespace lockstep::cuda {
namespace {

// q, k and v are column ranges of one buffer [rows, conv_channels]; beta, g and out are dense.
GdnParams ParamsOf(const void* qkv, const void* beta, const void* g, void* out, int32_t key_heads, int32_t value_heads,
                   int32_t conv_width, void* state, int64_t slot_stride, const void* pieces, int32_t piece_count,
                   int32_t decode_pieces, const void* tiles, int32_t tile_count) {
  const auto* q = static_cast<const __nv_bfloat16*>(qkv);
  const int64_t channels = GdnConvChannels(key_heads, value_heads);
  const int64_t key_width = int64_t{key_heads} * kGdnKeyDim;
  GdnParams params = {.q = q,
                      .k = q + key_width,
                      .v = q + 2 * key_width,
                      .beta = static_cast<const __nv_bfloat16*>(beta),
                      .g = static_cast<const float*>(g),
                      .out = static_cast<__nv_bfloat16*>(out),
                      .q_stride = channels,
                      .k_stride = channels,
                      .v_stride = channels,
                      .beta_stride = value_heads,
                      .g_stride = value_heads,
                      .out_stride = int64_t{value_heads} * kGdnValueDim,
                      .key_heads = key_heads,
                      .value_heads = value_heads,
                      .state = static_cast<char*>(state),
                      .slot_stride = slot_stride,
                      .layout = MakeGdnStateLayout(key_heads, value_heads, conv_width),
                      .batch = {}};
  params.batch.pieces = static_cast<const DevicePiece*>(pieces);
  params.batch.tiles = static_cast<const DeviceTile*>(tiles);
  params.batch.piece_count = piece_count;
  params.batch.decode_pieces = decode_pieces;
  params.batch.tile_count = tile_count;
  return params;
}

}  // namespace
}  // namespace lockstep::cuda

extern "C" {

// offsets: conv_tail, state_f32, image, k_rows, bv_rows, vp_rows, solve, scalars, bytes.
int lockstep_gdn_state_layout(int32_t key_heads, int32_t value_heads, int32_t conv_width, int64_t* offsets) {
  const lockstep::cuda::GdnStateLayout layout = lockstep::cuda::MakeGdnStateLayout(key_heads, value_heads, conv_width);
  const int64_t values[] = {layout.conv_tail, layout.state_f32, layout.image,   layout.k_rows, layout.bv_rows,
                            layout.vp_rows,   layout.solve,     layout.scalars, layout.bytes};
  for (const int64_t value : values) *offsets++ = value;
  return 0;
}

int64_t lockstep_gdn_state_element(int32_t dk, int32_t dv) {
  return lockstep::cuda::GdnStateElement(dk, dv);
}

int64_t lockstep_gdn_prefill_workspace_bytes(int64_t value_heads, int64_t tiles) {
  return lockstep::cuda::GdnPrefillWorkspaceBytes(value_heads, tiles);
}

int lockstep_gdn_decode(const void* qkv, const void* beta, const void* g, void* out, int32_t key_heads,
                        int32_t value_heads, int32_t conv_width, void* state, int64_t slot_stride, const void* pieces,
                        int32_t piece_count, int32_t decode_pieces, void* stream) {
  return lockstep::cuda::CApiResult(lockstep::cuda::LaunchGdnDecode(
      lockstep::cuda::ParamsOf(qkv, beta, g, out, key_heads, value_heads, conv_width, state, slot_stride, pieces,
                               piece_count, decode_pieces, nullptr, 0),
      static_cast<cudaStream_t>(stream)));
}

int lockstep_gdn_prefill(const void* qkv, const void* beta, const void* g, void* out, int32_t key_heads,
                         int32_t value_heads, int32_t conv_width, void* state, int64_t slot_stride, const void* pieces,
                         int32_t piece_count, int32_t decode_pieces, const void* tiles, int32_t tile_count,
                         void* workspace, int64_t workspace_bytes, void* stream) {
  return lockstep::cuda::CApiResult(lockstep::cuda::LaunchGdnPrefill(
      {.gdn = lockstep::cuda::ParamsOf(qkv, beta, g, out, key_heads, value_heads, conv_width, state, slot_stride,
                                       pieces, piece_count, decode_pieces, tiles, tile_count),
       .workspace = workspace,
       .workspace_bytes = workspace_bytes},
      static_cast<cudaStream_t>(stream)));
}

}  // extern "C"

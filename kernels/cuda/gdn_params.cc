#include "kernels/cuda/gdn_params.h"

#include <initializer_list>

#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kMaxHeads = 65535;  // a grid dimension

struct Rows {
  const char* name;
  const void* pointer;
  uintptr_t alignment;
  const char* stride_name;
  int64_t stride;
  int64_t width;
  int64_t multiple;
};

}  // namespace

absl::Status GdnParams::Validate() const {
  if (key_heads <= 0 || key_heads > kMaxHeads) return BadField("GdnParams.key_heads", key_heads, "1 to 65535");
  if (value_heads <= 0 || value_heads > kMaxHeads || value_heads % key_heads != 0) {
    return BadField("GdnParams.value_heads", value_heads, "a multiple of key_heads from 1 to 65535");
  }
  const int64_t key_width = int64_t{key_heads} * kGdnKeyDim;
  const int64_t value_width = int64_t{value_heads} * kGdnValueDim;
  for (const Rows& rows :
       std::initializer_list<Rows>{{"GdnParams.q", q, 16, "GdnParams.q_stride", q_stride, key_width, 8},
                                   {"GdnParams.k", k, 16, "GdnParams.k_stride", k_stride, key_width, 8},
                                   {"GdnParams.v", v, 16, "GdnParams.v_stride", v_stride, value_width, 8},
                                   {"GdnParams.beta", beta, 2, "GdnParams.beta_stride", beta_stride, value_heads, 1},
                                   {"GdnParams.g", g, 4, "GdnParams.g_stride", g_stride, value_heads, 1},
                                   {"GdnParams.out", out, 16, "GdnParams.out_stride", out_stride, value_width, 8}}) {
    if (absl::Status status = CheckPointer(rows.name, rows.pointer, rows.alignment); !status.ok()) return status;
    if (absl::Status status = CheckStride(rows.stride_name, rows.stride, rows.width, rows.multiple); !status.ok())
      return status;
  }
  if (absl::Status status = CheckPointer("GdnParams.state", state, 256); !status.ok()) return status;
  if (layout.bytes < value_heads * (kGdnStateF32Bytes + kGdnImageBytes)) {
    return BadField("GdnParams.layout.bytes", layout.bytes, "MakeGdnStateLayout of these head counts");
  }
  if (slot_stride < layout.bytes || slot_stride % 256 != 0) {
    return BadField("GdnParams.slot_stride", slot_stride, "at least layout.bytes and a multiple of 256");
  }
  if (batch.decode_pieces < 0 || batch.piece_count < batch.decode_pieces || batch.piece_count > kMaxHeads) {
    return BadField("GdnParams.batch.piece_count", batch.piece_count, "decode_pieces to 65535");
  }
  if (batch.tile_count < 0) return BadField("GdnParams.batch.tile_count", batch.tile_count, "0 or more");
  if (batch.piece_count > 0) {
    if (absl::Status status = CheckPointer("GdnParams.batch.pieces", batch.pieces, 4); !status.ok()) return status;
  }
  if (batch.tile_count > 0) return CheckPointer("GdnParams.batch.tiles", batch.tiles, 4);
  return absl::OkStatus();
}

}  // namespace lockstep::cuda

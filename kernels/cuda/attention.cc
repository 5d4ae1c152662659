#include "kernels/cuda/attention.h"

#include <cmath>
#include <utility>

#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr uintptr_t kRowAlignment = 16;
constexpr uintptr_t kWorkspaceAlignment = 128;
constexpr double kLog2E = 1.4426950408889634074;
constexpr int64_t kRowMultiple = 8;  // elements: 16 bytes

}  // namespace

absl::Status AttentionParams::Validate() const {
  if (program != AttentionProgram::kCudnn && program != AttentionProgram::kFa2 &&
      program != AttentionProgram::kCudnnMask) {
    return BadField("AttentionParams.program", static_cast<int>(program), "kCudnn, kFa2 or kCudnnMask");
  }
  if (absl::Status status = kv.Validate(); !status.ok()) return status;
  if (heads <= 0 || heads > 1024 || heads % kv.kv_heads != 0) {
    return BadField("AttentionParams.heads", heads, "1 to 1024, a multiple of kv.kv_heads");
  }
  if (window < 0 || window > INT32_MAX) return BadField("AttentionParams.window", window, "0 to 2^31 - 1");
  if (!std::isfinite(scale) || scale <= 0.0f) return BadField("AttentionParams.scale", scale, "above 0 and finite");
  if (absl::Status status = CheckPointer("AttentionParams.q", q, kRowAlignment); !status.ok()) return status;
  if (absl::Status status = CheckPointer("AttentionParams.out", out, kRowAlignment); !status.ok()) return status;
  const int64_t width = heads * kKvHeadDim;
  if (absl::Status status = CheckStride("AttentionParams.q_stride", q_stride, width, kRowMultiple); !status.ok())
    return status;
  if (absl::Status status = CheckStride("AttentionParams.out_stride", out_stride, width, kRowMultiple); !status.ok())
    return status;
  // 65,535: a grid's second dimension.
  if (batch.decode_pieces < 0 || batch.decode_pieces > 65535 || batch.decode_pieces > batch.piece_count) {
    return BadField("AttentionParams.batch.decode_pieces", batch.decode_pieces, "0 to piece_count, at most 65535");
  }
  if (batch.tile_count < 0) return BadField("AttentionParams.batch.tile_count", batch.tile_count, "0 or more");
  if (workspace != nullptr) {
    if (absl::Status status = CheckPointer("AttentionParams.workspace", workspace, kWorkspaceAlignment); !status.ok())
      return status;
    if (max_positions <= 0 || max_positions > INT32_MAX) {
      return BadField("AttentionParams.max_positions", max_positions, "1 to 2^31 - 1 with a workspace");
    }
    const int64_t wanted = AttentionWorkspaceBytes(batch, heads, kv.kv_heads, max_positions);
    if (workspace_bytes < wanted) {
      return absl::InvalidArgumentError(
          absl::StrCat("AttentionParams.workspace_bytes: ", workspace_bytes, ", want at least ", wanted));
    }
  }
  if (batch.share_count < 0 || batch.share_count > 65535) {
    return BadField("AttentionParams.batch.share_count", batch.share_count, "0 to 65535");
  }
  if (batch.decode_pieces == 0 && batch.tile_count == 0) return absl::OkStatus();
  if (batch.share_count > 0) {
    if (absl::Status status = CheckPointer("AttentionParams.batch.shares", batch.shares, sizeof(int32_t)); !status.ok())
      return status;
  }
  const std::pair<const char*, const void*> arrays[] = {{"AttentionParams.batch.pieces", batch.pieces},
                                                        {"AttentionParams.batch.pages", batch.pages}};
  for (const auto& [field, pointer] : arrays) {
    if (absl::Status status = CheckPointer(field, pointer, sizeof(int32_t)); !status.ok()) return status;
  }
  if (batch.tile_count == 0) return absl::OkStatus();
  return CheckPointer("AttentionParams.batch.tiles", batch.tiles, sizeof(int32_t));
}

AttentionArgs MakeAttentionArgs(const AttentionParams& params) {
  return {.kv = params.kv.base,
          .batch = params.batch,
          .q = params.q,
          .out = params.out,
          .q_stride = params.q_stride,
          .out_stride = params.out_stride,
          .page_rows = static_cast<int32_t>(params.kv.page_bytes / kKvRowBytes),
          .page_size = static_cast<int32_t>(params.kv.page_size),
          .kv_heads = static_cast<int32_t>(params.kv.kv_heads),
          .group = static_cast<int32_t>(params.heads / params.kv.kv_heads),
          .window = static_cast<int32_t>(params.window),
          .exponent = {.folded = static_cast<float>(params.scale * kLog2E),
                       .scale = params.scale,
                       .log2e = static_cast<float>(kLog2E)},
          .shared_rows = nullptr};
}

int64_t DecodeUnits(int64_t heads, int64_t kv_heads) {
  return kv_heads * ((heads / kv_heads + kDecodeColumns - 1) / kDecodeColumns);
}

int64_t AttentionWorkspaceBytes(const DeviceBatch& batch, int64_t heads, int64_t kv_heads, int64_t max_positions) {
  if (DecodeIsSpread(batch.decode_pieces, heads, kv_heads)) {
    return SpreadWorkspaceBytes(batch.decode_pieces, heads, kv_heads, max_positions);
  }
  if (batch.share_count == 0 || heads != kv_heads) return 0;
  return batch.decode_pieces * heads * static_cast<int64_t>(sizeof(RowState));
}

absl::Status LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (absl::Status status = LaunchAttentionPrefill(params, stream); !status.ok()) return status;
  return LaunchAttentionDecode(params, stream);
}

}  // namespace lockstep::cuda

#include "kernels/cpu/gdn_chunk.h"

#include <algorithm>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

// One key head over all rows of a piece, in blocks that end at multiples of kGdnBlock from the sequence's start.
void RunPiece(const CpuContext& ctx, const GdnStateLayout& layout, const GdnShape& shape, const Piece& piece,
              int64_t key_head, Rows qkv, Rows beta, Rows g, Rows out, float* scratch) {
  const bool bf16 = ctx.profile.gdn == GdnProgram::kChunkBf16;
  for (int64_t row = 0; row < piece.row_count;) {
    const int64_t position = piece.position + row;
    const int64_t rows = std::min(kGdnBlock - position % kGdnBlock, piece.row_count - row);
    const int64_t begin = piece.row_begin + row;
    const GdnBlock block = {.layout = layout,
                            .shape = shape,
                            .profile = ctx.profile,
                            .slot = piece.gdn_state,
                            .key_head = key_head,
                            .rows = rows,
                            .open = position % kGdnChunk,
                            .first_chunk = position < kGdnChunk,
                            .qkv = qkv.slice(begin, rows),
                            .beta = beta.slice(begin, rows),
                            .g = g.slice(begin, rows),
                            .out = out.slice(begin, rows),
                            .scratch = scratch};
    if (bf16) {
      GdnChunkBf16Block(block);
    } else {
      GdnChunkFp32Block(block);
    }
    row += rows;
  }
}

}  // namespace

void CpuGdnChunk(const CpuContext& ctx, Rows qkv, Rows beta, Rows g, const GdnShape& shape,
                 std::span<const Piece> pieces, Rows out) {
  LOCKSTEP_CHECK(qkv.width == shape.conv_channels(), "qkv has {} columns, want {}", qkv.width, shape.conv_channels());
  LOCKSTEP_CHECK(beta.width == shape.value_heads && g.width == shape.value_heads,
                 "beta has {} columns and g {}, want {}", beta.width, g.width, shape.value_heads);
  LOCKSTEP_CHECK(out.width == shape.value_width(), "out has {} columns, want {}", out.width, shape.value_width());
  static_assert(kGdnChunk % kGdnBlock == 0);
  const GdnStateLayout layout(ctx.profile, shape);
  for (const Piece& piece : pieces) {
    const int64_t tokens = reinterpret_cast<const GdnStateHeader*>(piece.gdn_state)->tokens;
    LOCKSTEP_CHECK(tokens == piece.position, "piece at position {}, its state has seen {} tokens", piece.position,
                   tokens);
    const int64_t end = piece.row_begin + piece.row_count;
    LOCKSTEP_CHECK(piece.row_begin >= 0 && end <= qkv.rows && end <= beta.rows && end <= g.rows && end <= out.rows,
                   "piece ends at row {} of {}", end, out.rows);
  }
  const int64_t scratch = ctx.profile.gdn == GdnProgram::kChunkBf16 ? GdnChunkBf16Scratch(layout, shape)
                                                                    : GdnChunkFp32Scratch(layout, shape);
  ctx.threads.ParallelFor(static_cast<int64_t>(pieces.size()) * shape.key_heads, 1,
                          [&](int64_t begin, int64_t end, int thread) {
                            for (int64_t i = begin; i < end; ++i) {
                              RunPiece(ctx, layout, shape, pieces[i / shape.key_heads], i % shape.key_heads, qkv, beta,
                                       g, out, ctx.scratch.Floats(thread, scratch));
                            }
                          });
  for (const Piece& piece : pieces) reinterpret_cast<GdnStateHeader*>(piece.gdn_state)->tokens += piece.row_count;
}

}  // namespace lockstep

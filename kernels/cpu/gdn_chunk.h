// The chunk program of Gated DeltaNet on the CPU. Decode computes row t of the same program as prefill: there is one
// program per GdnProgram, over blocks of 1 to 16 rows, and a block's size does not show in its rows' bits.
#pragma once

#include <span>

#include "kernels/cpu/context.h"
#include "kernels/cpu/gdn_state.h"
#include "kernels/ops.h"

namespace lockstep {

// Every piece's position must be the number of tokens its state has seen.
void CpuGdnChunk(const CpuContext& ctx, Rows qkv, Rows beta, Rows g, const GdnShape& shape,
                 std::span<const Piece> pieces, Rows out);

// Rows of one key head (with its value heads) of one sequence that a program takes at once: at most kGdnBlock, within
// one chunk.
constexpr int64_t kGdnBlock = 16;

struct GdnBlock {
  const GdnStateLayout& layout;
  const GdnShape& shape;
  const NumericsProfile& profile;
  std::byte* slot;  // the sequence's state
  int64_t key_head;
  int64_t rows;
  int64_t open;      // rows already in the open chunk; open + rows <= kGdnChunk
  bool first_chunk;  // S is zero and not stored yet
  Rows qkv;          // [rows, conv_channels]
  Rows beta;         // [rows, value_heads]
  Rows g;            // [rows, value_heads]
  Rows out;          // [rows, value_width]
  float* scratch;    // GdnChunk*Scratch(shape) floats, 64-byte aligned
};

// gdn_chunk_fp32.cc
int64_t GdnChunkFp32Scratch(const GdnStateLayout& layout, const GdnShape& shape);
void GdnChunkFp32Block(const GdnBlock& block);
// gdn_chunk_bf16.cc
int64_t GdnChunkBf16Scratch(const GdnStateLayout& layout, const GdnShape& shape);
void GdnChunkBf16Block(const GdnBlock& block);

}  // namespace lockstep

// What a sequence keeps of one Gated DeltaNet layer: where each part lies in the sequence's slot.
//
// The state S of a head is kept at the last multiple of 64 positions (the chunk boundary), with the rows of the chunk
// that is still open. Nothing needs zeroing in a fresh slot: S counts as zero for positions below 64 and is not read,
// and rows that the open chunk does not have yet are never read. Where a part is read, its bytes do not depend on
// whether prefill or decode wrote them.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

inline constexpr int kGdnChunk = 64;      // rows; chunks are counted from the start of the sequence
inline constexpr int kGdnKeyDim = 96;     // d_k
inline constexpr int kGdnValueDim = 192;  // d_v

// Bytes of one value head in each part.
inline constexpr int64_t kGdnStateF32Bytes = int64_t{4} * kGdnKeyDim * kGdnValueDim;
inline constexpr int64_t kGdnImageBytes = int64_t{2} * kGdnKeyDim * kGdnValueDim;
inline constexpr int64_t kGdnKeyRowsBytes = int64_t{2} * kGdnChunk * kGdnKeyDim;
inline constexpr int64_t kGdnValueRowsBytes = int64_t{2} * kGdnChunk * kGdnValueDim;
inline constexpr int64_t kGdnSolveBytes = int64_t{13} * 16 * 16 * 4;
inline constexpr int64_t kGdnScalarBytes = int64_t{3} * kGdnChunk * 4;

// Byte offsets from the start of a layer's part of a slot. Every part but conv_tail is [value_heads, its bytes above];
// the order inside a head's bytes is in gdn_math.cuh.
struct GdnStateLayout {
  int64_t conv_tail =
      0;  // bf16 [conv_width - 1, conv_channels], position p in row p % (conv_width - 1); the convolution's own
  int64_t state_f32 = 0;  // S in fp32, in MMA accumulator order
  int64_t image = 0;      // S in bf16, in MMA operand order
  int64_t k_rows = 0;     // bf16 [64, 96]: k of the open chunk
  int64_t bv_rows = 0;    // bf16 [64, 192]: bf16(beta v)
  int64_t vp_rows = 0;    // bf16 [64, 192]: v'
  int64_t solve = 0;      // fp32 [13, 16, 16]: the triangular inverse and what its next row needs
  int64_t scalars = 0;    // fp32 [3, 64]: g, G, beta
  int64_t bytes = 0;      // of the whole; a multiple of 256
};

// Channels of the convolution: q | k | v.
constexpr int64_t GdnConvChannels(int64_t key_heads, int64_t value_heads) {
  return 2 * key_heads * kGdnKeyDim + value_heads * kGdnValueDim;
}

// Each part starts at a multiple of 256 bytes.
GdnStateLayout MakeGdnStateLayout(int64_t key_heads, int64_t value_heads, int64_t conv_width);

// Where S[dk][dv] of a head lies in its state_f32 part, in floats.
constexpr int64_t GdnStateElement(int dk, int dv) {
  const int tile = (dv / 16) * (kGdnKeyDim / 8) + dk / 8;
  const int lane = (dv % 8) * 4 + (dk % 8) / 2;
  return int64_t{tile} * 128 + lane * 4 + (dv % 16) / 8 * 2 + dk % 2;
}

}  // namespace lockstep::cuda

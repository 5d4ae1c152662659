// One sequence's state of one Gated DeltaNet layer on the CPU: plain bytes in a slot, so that copying the slot copies
// the sequence.
//
//   header             tokens seen
//   convolution tail   [conv_width - 1][channels], the last input rows; position p in row p % (conv_width - 1)
//   per key head       keys of the open chunk: 4 panels [d_k][16], key j in panel j / 16, lane j % 16
//     for kChunkFp32   as they came, in the activations' type, and the factor [64] that normalises each
//     for kChunkBf16   l2-normalised, bf16
//   per value head     S [d_k][d_v] fp32 at the last chunk boundary, G [64], v' of the open chunk [64][d_v] fp32, and
//     for kChunkFp32   the sum behind G in fp64; u and w of the open chunk side by side, [64][d_v + d_k] fp32
//     for kChunkBf16   bf16 image of S; T [64][64] fp32; bf16(beta v) and bf16(v') [64][d_v];
//                      bf16(bf16(beta k) 2^G) [64][d_k]
//
// d_v (and d_k where it is a row) is padded to a multiple of 16. Every part begins at a multiple of 64 bytes. At d_k,
// d_v = 96, 192 a key head takes 12,544 bytes (24,832 with fp32 activations; kChunkBf16: 12,288) and a value head
// 196,928 (kChunkBf16: 237,824).
// Nothing is read before it is written: S not before the first boundary, a row of the open chunk not before its token.
// So a reset is the header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/context.h"
#include "kernels/numerics.h"
#include "kernels/ops.h"

namespace lockstep {

struct GdnStateHeader {
  int64_t tokens;  // that GdnChunk has seen; tokens % kGdnChunk rows of the chunk are open
};

// Where everything is, in bytes from the slot's begin; parts of a head from the head's begin.
struct GdnStateLayout {
  GdnStateLayout(const NumericsProfile& profile, const GdnShape& shape);

  int64_t key_pitch;    // d_k rounded up to 16
  int64_t value_pitch;  // d_v rounded up to 16
  int64_t conv_tail;
  int64_t conv_row_bytes;
  int64_t key_heads;
  int64_t key_head_bytes;
  int64_t value_heads;
  int64_t value_head_bytes;
  int64_t bytes;

  int64_t key_factors;  // within a key head

  // Within a value head.
  int64_t state;
  int64_t decay;  // G
  int64_t new_values;
  int64_t decay_sum;
  int64_t solved;  // u, w
  int64_t state_image;
  int64_t inverse;
  int64_t beta_values;
  int64_t beta_keys;
  int64_t new_values_bf16;
};

int64_t CpuGdnStateBytes(const CpuContext& ctx, const GdnShape& shape);
void CpuGdnResetState(const CpuContext& ctx, const GdnShape& shape, std::byte* state);

}  // namespace lockstep

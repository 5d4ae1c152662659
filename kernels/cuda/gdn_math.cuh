// The steps of Gated DeltaNet's chunk program, each defined once for prefill and decode, and the layouts both share.
//
// Products run on tensor cores, which alone round as the trainer's do: groups of 16 terms (bf16) or 8 (tf32), in
// ascending order into one fp32 accumulator. Within a group, and between the two operands, order is free; a term with a
// zero factor changes nothing as long as the other factor is finite.
//
// Fragment names follow PTX: in mma.m16n8k16 lane 4g + c holds of A (16 x 16) the pairs {a0: row g, columns 2c and
// 2c+1; a1: row g+8; a2: columns + 8; a3: both}, of B (16 x 8) {b0: rows 2c and 2c+1, column g; b1: rows + 8} and of
// the accumulator (16 x 8) {0, 1: row g, columns 2c and 2c+1; 2, 3: row g+8}.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/gdn_params.h"
#include "kernels/cuda/gdn_ptx.cuh"
#include "kernels/cuda/gdn_state.h"

namespace lockstep::cuda::gdn {

inline constexpr int kBlock = 16;                        // rows of a block of the triangular solve
inline constexpr int kBlockFloats = kBlock * kBlock;     // floats of such a block
inline constexpr int kKeySteps = kGdnKeyDim / 16;        // mma steps over d_k
inline constexpr int kValueTiles = kGdnValueDim / 16;    // mma row tiles over d_v
inline constexpr int kKeyRowBytes = 2 * kGdnKeyDim;      // of one row of k
inline constexpr int kValueRowBytes = 2 * kGdnValueDim;  // of one row of v
inline constexpr int kKeyRowChunks = kKeyRowBytes / 16;
inline constexpr int kValueRowChunks = kValueRowBytes / 16;
inline constexpr int kTriangleBlocks = 10;       // blocks (r, c), c <= r < 4
inline constexpr float kScale = 0x1.a20bd8p-4f;  // float(96^-0.5)

// ---- Layouts of the open chunk's rows, in shared memory as in the slot: 16-byte chunks permuted within a row so that
// ldmatrix reads 8 rows without bank conflicts.

__device__ inline int KeyOffset(int row, int chunk) {
  return row * kKeyRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

__device__ inline int ValueOffset(int row, int chunk) {
  return row * kValueRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Bytes from rows 0-15, step s % 2 to rows `first` (a multiple of 16) and on, step s: the permutation is the same
// there.
__device__ inline constexpr int KeyStep(int first, int s) {
  return first * kKeyRowBytes + (s >> 1) * 64;
}

// ---- Layout of the solve cache: 13 blocks of 16 x 16 floats. Blocks (r, c) of the inverse T = (I + A)^-1 come row by
// row, of each row the diagonal one first; then, for the block row r that is being filled, A of (r, r-1) and the inner
// sums of (r, 0) and (r, 1) that MergeFar describes.

__device__ inline constexpr int InverseBlock(int r, int c) {
  return r * (r + 1) / 2 + (c == r ? 0 : 1 + c);
}
inline constexpr int kAdjacentBlock = 10;
inline constexpr int kInnerBlock = 11;  // + c

__device__ inline constexpr int BlockElement(int row, int column) {
  return row * kBlock + (column ^ ((row & 2) << 2));
}

// ---- Scalars of the slot, in floats.
inline constexpr int kScalarG = 0;      // raw g
inline constexpr int kScalarScan = 64;  // G
inline constexpr int kScalarBeta = 2 * 64;

// One head's parts of a slot.
struct HeadState {
  char* state_f32;
  char* image;
  char* k_rows;
  char* bv_rows;
  char* vp_rows;
  float* solve;
  float* scalars;
};

__device__ inline HeadState StateOf(const GdnParams& params, int slot, int head) {
  char* base = params.state + slot * params.slot_stride;
  const GdnStateLayout& layout = params.layout;
  return {.state_f32 = base + layout.state_f32 + head * kGdnStateF32Bytes,
          .image = base + layout.image + head * kGdnImageBytes,
          .k_rows = base + layout.k_rows + head * kGdnKeyRowsBytes,
          .bv_rows = base + layout.bv_rows + head * kGdnValueRowsBytes,
          .vp_rows = base + layout.vp_rows + head * kGdnValueRowsBytes,
          .solve = reinterpret_cast<float*>(base + layout.solve + head * kGdnSolveBytes),
          .scalars = reinterpret_cast<float*>(base + layout.scalars + head * kGdnScalarBytes)};
}

// ---- Pairs of bf16.

__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline float2 UnpackBf16(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}

// ---- Matrices in the layouts above. `first` is a row that is a multiple of 16.

// Rows [first, first + 16) of k or q, 16 columns of step s: as an A operand (rows the rows), or as two B operands with
// the rows as columns: {r[0], r[2]} for rows 0-7 and {r[1], r[3]} for rows 8-15.
__device__ inline void LoadKeyRows(uint32_t (&r)[4], const char* rows, int first, int s, int lane) {
  LoadMatrices(r, SharedAddress(rows) + KeyOffset(lane & 15, 2 * (s & 1) + (lane >> 4)) + KeyStep(first, s));
}

// The transpose as two B operands: rows of k are the k index, columns 16s+0-7 {r[0], r[1]}, 16s+8-15 {r[2], r[3]}.
__device__ inline void LoadKeyColumnsB(uint32_t (&r)[4], const char* rows, int first, int s, int lane) {
  LoadMatricesTransposed(r, SharedAddress(rows) + KeyOffset(lane & 15, 2 * (s & 1) + (lane >> 4)) + KeyStep(first, s));
}

// The transpose as an A operand: columns 16s .. 16s+15 are its rows.
__device__ inline void LoadKeyColumnsA(uint32_t (&r)[4], const char* rows, int first, int s, int lane) {
  LoadMatricesTransposed(r, SharedAddress(rows) +
                                KeyOffset(((lane >> 4) << 3) + (lane & 7), 2 * (s & 1) + ((lane >> 3) & 1)) +
                                KeyStep(first, s));
}

// The same of value rows: columns 16 tile .. + 15 are the A operand's rows.
__device__ inline void LoadValueColumnsA(uint32_t (&r)[4], const char* rows, int first, int tile, int lane) {
  LoadMatricesTransposed(r, SharedAddress(rows) +
                                ValueOffset(((lane >> 4) << 3) + (lane & 7), 2 * tile + ((lane >> 3) & 1)) +
                                first * kValueRowBytes);
}

// Block (r, c) of T in bf16, as LoadKeyRows would give it: an A operand {0, 1, 2, 3}, or two B operands {0, 2}, {1, 3}
// with T's rows as columns.
__device__ inline void LoadInverse(uint32_t (&r)[4], const float* block, int lane) {
  const int row = lane >> 2;
  const int column = (lane & 3) * 2;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const float2 pair =
        *reinterpret_cast<const float2*>(block + BlockElement(row + (x & 1) * 8, column + (x >> 1) * 8));
    r[x] = PackBf16(pair.x, pair.y);
  }
}

// ---- The steps.

// G of rows lane and lane + 32 from their raw g: a shuffle scan of each half, the first half's total added to the
// second, times log2(e). Rows above the last must hold zero or come later than every row that is used.
__device__ inline float2 ScanGates(float low, float high, int lane) {
  constexpr float kLog2E = 1.44269502162933349609375f;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float low_before = __shfl_up_sync(0xFFFFFFFFu, low, distance);
    const float high_before = __shfl_up_sync(0xFFFFFFFFu, high, distance);
    if (lane >= distance) {
      low = low_before + low;
      high = high_before + high;
    }
  }
  high = __shfl_sync(0xFFFFFFFFu, low, 31) + high;
  return make_float2(low * kLog2E, high * kLog2E);
}

// A_ij, j < i, of k_i . k_j.
__device__ inline float LowerElement(float dot, float decay, float beta) {
  return dot * decay * beta;
}

// Element x of row i of a diagonal block of the inverse: a = -A's row i (zero from i on), `column` that column's rows
// above i without the unit diagonal (zero from i on).
__device__ inline float InverseElement(const float (&a)[kBlock], const float (&column)[kBlock], float own,
                                       float diagonal) {
  float p[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) p[c] = __fmaf_rn(a[c], column[c], a[c + 8] * column[c + 8]);
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
#pragma unroll
    for (int c = 0; c < half; ++c) p[c] = p[c] + p[c + half];
  }
  return own + p[0] + diagonal;
}

// How a product of the block merges groups its 16 terms into two tf32 steps: term p of step s.
enum class MergeOrder { kEvenOdd, kHalves };

template <MergeOrder kOrder>
__device__ inline constexpr int MergeTerm(int s, int p) {
  return kOrder == MergeOrder::kEvenOdd ? 2 * p + s : 8 * s + p;
}

// bf16(beta v), two at a time.
__device__ inline uint32_t BetaValues(uint32_t v, float beta) {
  const float2 pair = UnpackBf16(v);
  return PackBf16(pair.x * beta, pair.y * beta);
}

// bf16(bf16(beta k) * exp2(G)) of two rows' elements of k.
__device__ inline uint32_t GatedKeys(uint32_t k, float2 beta, float2 exp_g) {
  const float2 pair = UnpackBf16(k);
  const float2 scaled = UnpackBf16(PackBf16(pair.x * beta.x, pair.y * beta.y));
  return PackBf16(scaled.x * exp_g.x, scaled.y * exp_g.y);
}

// o of q . bf16(S), exp2(G) and the chain over P v'.
__device__ inline float OutputElement(float q_s, float exp_g, float p_v) {
  return __fmaf_rn(kScale, q_s * exp_g, kScale * p_v);
}

}  // namespace lockstep::cuda::gdn

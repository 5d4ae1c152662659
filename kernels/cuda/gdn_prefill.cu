#include <algorithm>

#include "kernels/cuda/gdn_math.cuh"
#include "kernels/cuda/gdn_prefill.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/warp_arrive.cuh"

namespace lockstep::cuda {
namespace {

using namespace gdn;  // NOLINT(google-build-using-namespace): this file is that namespace's host

// What the first kernel hands to the second of one tile and head: operands in fragment order, 16 bytes a lane.
constexpr int kRecordU = 0;                                        // bf16 u^T [12 value tiles][4 blocks][32 lanes]
constexpr int kRecordW = kRecordU + 2 * kGdnChunk * kGdnValueDim;  // bf16 w, B operand [6 steps][4 blocks][32]
constexpr int kRecordQ = kRecordW + 2 * kGdnChunk * kGdnKeyDim;    // bf16 q, as w
constexpr int kRecordK = kRecordQ + 2 * kGdnChunk * kGdnKeyDim;    // bf16 k^T, B operand [4 blocks][6 steps][32]
constexpr int kRecordP = kRecordK + 2 * kGdnChunk * kGdnKeyDim;    // bf16 q k^T decayed [10 lower blocks][32]
constexpr int kRecordExp = kRecordP + kTriangleBlocks * 512;       // fp32 exp2(G_i), exp2(G_63 - G_i), exp2(G_63)
constexpr int kRecordUsed = kRecordExp + 4 * (2 * kGdnChunk + 4);
constexpr int kRecordBytes = (kRecordUsed + 255) / 256 * 256;

// A range of the batch's tiles, as many as the workspace holds.
struct Window {
  int32_t begin;
  int32_t end;
  char* records;  // [end - begin, value_heads] of kRecordBytes
};

__device__ int LowerBlock(int r, int c) {
  return r * (r + 1) / 2 + c;
}

// ---- First kernel: everything of a chunk that does not depend on the state.

constexpr int kChunkThreads = 128;

// Four of these in an SM leave not a float to spare: see Lower and q.
struct ChunkShared {
  alignas(128) char k[kGdnKeyRowsBytes];
  char bv[kGdnValueRowsBytes];
  float inverse[kTriangleBlocks][kBlockFloats];    // T, by InverseBlock
  float lower[kTriangleBlocks - 1][kBlockFloats];  // A
  float g[kGdnChunk];
  float scan[kGdnChunk];
  float beta[kGdnChunk];
  float exp_g[kGdnChunk];

  // Read into registers before the first block of A is written.
  __device__ char* q() { return reinterpret_cast<char*>(inverse); }
  // A's block (0, 0) is dead before T's (3, 0), the last one, comes into its place.
  __device__ float* Lower(int r, int c) { return r == 0 ? inverse[InverseBlock(3, 0)] : lower[LowerBlock(r, c) - 1]; }
};
static_assert(sizeof(ChunkShared::inverse) + sizeof(ChunkShared::lower) >= kGdnKeyRowsBytes);

// The rows of one chunk that a tile adds, [first, end), after those that the slot has.
struct ChunkRows {
  int first;
  int end;
  int64_t batch_row;  // of chunk row 0; may be negative
  bool open;          // the piece ends in mid-chunk: the slot takes over what the next row needs
};

__device__ ChunkRows RowsOf(const DevicePiece& piece, const DeviceTile& tile) {
  const int first = tile.position % kGdnChunk;
  const int end = first + tile.row_count;
  return {.first = first,
          .end = end,
          .batch_row = int64_t{tile.row_begin} - first,
          .open = tile.position + tile.row_count == piece.position + piece.row_count && end < kGdnChunk};
}

// k, q and bf16(beta v) of the chunk, zeros past its end; g, beta and the scan.
__device__ void LoadChunk(const GdnParams& params, const ChunkRows& rows, const HeadState& state, int head,
                          ChunkShared& shared) {
  const int key_head = head / (params.value_heads / params.key_heads);
  const int thread = threadIdx.x;
  if (thread < 32) {
    float g[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 32 + thread;
      float beta = 0;
      g[half] = 0;
      if (row < rows.first) {
        g[half] = state.scalars[kScalarG + row];
        beta = state.scalars[kScalarBeta + row];
      } else if (row < rows.end) {
        g[half] = params.g[(rows.batch_row + row) * params.g_stride + head];
        beta = __bfloat162float(params.beta[(rows.batch_row + row) * params.beta_stride + head]);
      }
      shared.g[row] = g[half];
      shared.beta[row] = beta;
    }
    const float2 scan = ScanGates(g[0], g[1], thread);
    shared.scan[thread] = scan.x;
    shared.scan[thread + 32] = scan.y;
    shared.exp_g[thread] = Exp2(scan.x);
    shared.exp_g[thread + 32] = Exp2(scan.y);
  }
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int x = thread; x < kGdnChunk * kKeyRowChunks; x += kChunkThreads) {
    const int row = x / kKeyRowChunks;
    const int chunk = x % kKeyRowChunks;
    const int offset = KeyOffset(row, chunk);
    uint4 k = zero;
    uint4 q = zero;
    if (row < rows.first) {
      k = *reinterpret_cast<const uint4*>(state.k_rows + offset);
    } else if (row < rows.end) {
      const int64_t column = int64_t{key_head} * kGdnKeyDim + chunk * 8;
      k = *reinterpret_cast<const uint4*>(params.k + (rows.batch_row + row) * params.k_stride + column);
      q = *reinterpret_cast<const uint4*>(params.q + (rows.batch_row + row) * params.q_stride + column);
    }
    *reinterpret_cast<uint4*>(shared.k + offset) = k;
    *reinterpret_cast<uint4*>(shared.q() + offset) = q;
  }
#pragma unroll 6
  for (int x = thread; x < kGdnChunk * kValueRowChunks; x += kChunkThreads) {
    const int row = x / kValueRowChunks;
    const int chunk = x % kValueRowChunks;
    const int offset = ValueOffset(row, chunk);
    uint4 v = zero;
    if (row < rows.first) {
      v = *reinterpret_cast<const uint4*>(state.bv_rows + offset);
    } else if (row < rows.end) {
      const int64_t column = int64_t{head} * kGdnValueDim + chunk * 8;
      const float beta = __bfloat162float(params.beta[(rows.batch_row + row) * params.beta_stride + head]);
      v = *reinterpret_cast<const uint4*>(params.v + (rows.batch_row + row) * params.v_stride + column);
      v = make_uint4(BetaValues(v.x, beta), BetaValues(v.y, beta), BetaValues(v.z, beta), BetaValues(v.w, beta));
    }
    *reinterpret_cast<uint4*>(shared.bv + offset) = v;
  }
}

__device__ void StoreLanes(char* record, int offset, int index, int lane, uint32_t x, uint32_t y, uint32_t z,
                           uint32_t w) {
  *reinterpret_cast<uint4*>(record + offset + (index * 32 + lane) * 16) = make_uint4(x, y, z, w);
}

// Block row r of A into shared memory, of decayed q k^T and of q into the record. All warps call it together.
__device__ void ComputeScores(int r, int lane, char* record, ChunkShared& shared) {
  uint32_t q[kKeySteps][4];
  uint32_t k[kKeySteps][4];
#pragma unroll
  for (int s = 0; s < kKeySteps; ++s) {
    LoadKeyRows(q[s], shared.q(), r * kBlock, s, lane);
    LoadKeyRows(k[s], shared.k, r * kBlock, s, lane);
    StoreLanes(record, kRecordQ, s * 4 + r, lane, q[s][0], q[s][2], q[s][1], q[s][3]);
  }
  __syncthreads();
  const int row = lane >> 2;
  const int column = (lane & 3) * 2;
  for (int b = 0; b <= r; ++b) {
    float kk[2][4] = {};
    float qk[2][4] = {};
#pragma unroll
    for (int s = 0; s < kKeySteps; ++s) {
      uint32_t other[4];
      LoadKeyRows(other, shared.k, b * kBlock, s, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        MmaBf16(kk[half], k[s], other[half], other[half + 2]);
        MmaBf16(qk[half], q[s], other[half], other[half + 2]);
      }
    }
    float* block = shared.Lower(r, b);
    uint32_t p[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int i = r * kBlock + row + below * 8;
        const int j = b * kBlock + column + half * 8;
        float lower[2];
        float weight[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float decay = Exp2(shared.scan[i] - shared.scan[j + e]);
          lower[e] = j + e < i ? LowerElement(kk[half][below * 2 + e], decay, shared.beta[i]) : 0.0f;
          weight[e] = j + e <= i ? qk[half][below * 2 + e] * decay : 0.0f;
        }
        *reinterpret_cast<float2*>(block + BlockElement(row + below * 8, column + half * 8)) =
            make_float2(lower[0], lower[1]);
        p[below * 2 + half] = PackBf16(weight[0], weight[1]);
      }
    }
    StoreLanes(record, kRecordP, LowerBlock(r, b), lane, p[0], p[1], p[2], p[3]);
  }
}

// The inverse of I + A within diagonal block r: a lane a column, both half-warps the same.
__device__ void InvertDiagonal(int r, int lane, ChunkShared& shared) {
  const float* lower = shared.Lower(r, r);
  float* inverse = shared.inverse[InverseBlock(r, r)];
  const int x = lane & 15;
  float column[kBlock] = {};
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float a[kBlock];
#pragma unroll
    for (int c = 0; c < kBlock; ++c) a[c] = c < i ? -lower[BlockElement(i, c)] : 0.0f;
    const float own = x < i ? -lower[BlockElement(i, x)] : 0.0f;
    const float value = InverseElement(a, column, own, x == i ? 1.0f : 0.0f);
    if (lane < kBlock) inverse[BlockElement(i, x)] = value;
    column[i] = x == i ? 0.0f : value;
  }
}

// T of (r, r-1): -(T_rr A) T_(r-1)(r-1).
__device__ void MergeAdjacent(int r, int lane, ChunkShared& shared) {
  const int g = lane >> 2;
  const int c = lane & 3;
  const float* own = shared.inverse[InverseBlock(r, r)];
  const float* lower = shared.Lower(r, r - 1);
  const float* above = shared.inverse[InverseBlock(r - 1, r - 1)];
  float inner[2][4] = {};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int k0 = MergeTerm<MergeOrder::kEvenOdd>(s, c);
    const int k1 = MergeTerm<MergeOrder::kEvenOdd>(s, c + 4);
    const float a[4] = {own[BlockElement(g, k0)], own[BlockElement(g + 8, k0)], own[BlockElement(g, k1)],
                        own[BlockElement(g + 8, k1)]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      MmaTf32(inner[half], a, lower[BlockElement(k0, g + half * 8)], lower[BlockElement(k1, g + half * 8)]);
    }
  }
  // Terms 2c and 2c+1 of each half sit in the lane that has them; a group's order is free.
  float result[2][4] = {};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float a[4] = {inner[s][0], inner[s][2], inner[s][1], inner[s][3]};
    const int k0 = MergeTerm<MergeOrder::kHalves>(s, 2 * c);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      MmaTf32(result[half], a, above[BlockElement(k0, g + half * 8)], above[BlockElement(k0 + 1, g + half * 8)]);
    }
  }
  float* out = shared.inverse[InverseBlock(r, r - 1)];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      *reinterpret_cast<float2*>(out + BlockElement(g + below * 8, 2 * c + half * 8)) =
          make_float2(-result[half][below * 2], -result[half][below * 2 + 1]);
    }
  }
}

// T of (r, q), q < r - 1: -T_rr (sum over b from q to r-1 of A_rb T_bq), all transposed. `keep` non-null: the inner sum
// goes there too.
__device__ void MergeFar(int r, int q, int lane, ChunkShared& shared, float* keep) {
  const int g = lane >> 2;
  const int c = lane & 3;
  float inner[2][4] = {};
  for (int b = q; b < r; ++b) {
    const float* lower = shared.Lower(r, b);
    const float* above = shared.inverse[InverseBlock(b, q)];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int k0 = MergeTerm<MergeOrder::kEvenOdd>(s, c);
      const int k1 = MergeTerm<MergeOrder::kEvenOdd>(s, c + 4);
      const float a[4] = {above[BlockElement(k0, g)], above[BlockElement(k0, g + 8)], above[BlockElement(k1, g)],
                          above[BlockElement(k1, g + 8)]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        MmaTf32(inner[half], a, lower[BlockElement(g + half * 8, k0)], lower[BlockElement(g + half * 8, k1)]);
      }
    }
  }
  if (keep != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) keep[BlockElement(half * 8 + 2 * c + (e & 1), g + (e >> 1) * 8)] = inner[half][e];
    }
  }
  const float* own = shared.inverse[InverseBlock(r, r)];
  float result[2][4] = {};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float a[4] = {inner[s][0], inner[s][2], inner[s][1], inner[s][3]};
    const int k0 = MergeTerm<MergeOrder::kHalves>(s, 2 * c);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      MmaTf32(result[half], a, own[BlockElement(g + half * 8, k0)], own[BlockElement(g + half * 8, k0 + 1)]);
    }
  }
  float* out = shared.inverse[InverseBlock(r, q)];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[BlockElement(half * 8 + 2 * c + (e & 1), g + (e >> 1) * 8)] = -result[half][e];
  }
}

// u^T of value tile `tile` into the record.
__device__ void ComputeU(int tile, int lane, const uint32_t (&inverse)[4][4][4], char* record,
                         const ChunkShared& shared) {
  uint32_t values[4][4];
#pragma unroll
  for (int b = 0; b < 4; ++b) LoadValueColumnsA(values[b], shared.bv, b * kBlock, tile, lane);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float u[2][4] = {};
#pragma unroll
    for (int b = 0; b <= r; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        MmaBf16(u[half], values[b], inverse[r][b][half], inverse[r][b][half + 2]);
      }
    }
    StoreLanes(record, kRecordU, tile * 4 + r, lane, PackBf16(u[0][0], u[0][1]), PackBf16(u[0][2], u[0][3]),
               PackBf16(u[1][0], u[1][1]), PackBf16(u[1][2], u[1][3]));
  }
}

// w's columns 16 s .. 16 s + 15 and k's into the record.
__device__ void ComputeW(int s, int lane, const uint32_t (&inverse)[4][4][4], char* record, const ChunkShared& shared) {
  uint32_t keys[4][4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    LoadKeyColumnsB(keys[b], shared.k, b * kBlock, s, lane);
    StoreLanes(record, kRecordK, b * kKeySteps + s, lane, keys[b][0], keys[b][1], keys[b][2], keys[b][3]);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int row = b * kBlock + (x & 1) * 8 + (lane & 3) * 2;
      keys[b][x] = GatedKeys(keys[b][x], *reinterpret_cast<const float2*>(shared.beta + row),
                             *reinterpret_cast<const float2*>(shared.exp_g + row));
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float w[2][4] = {};
#pragma unroll
    for (int b = 0; b <= r; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) MmaBf16(w[half], inverse[r][b], keys[b][2 * half], keys[b][2 * half + 1]);
    }
    StoreLanes(record, kRecordW, s * 4 + r, lane, PackBf16(w[0][0], w[0][1]), PackBf16(w[1][0], w[1][1]),
               PackBf16(w[0][2], w[0][3]), PackBf16(w[1][2], w[1][3]));
  }
}

// The open chunk's new rows and the solve cache to the slot (MergeFar wrote its part).
__device__ void StoreOpenChunk(const ChunkRows& rows, const HeadState& state, ChunkShared& shared) {
  const int thread = threadIdx.x;
  const int added = rows.end - rows.first;
  for (int x = thread; x < added * kKeyRowChunks; x += kChunkThreads) {
    const int offset = rows.first * kKeyRowBytes + x * 16;
    *reinterpret_cast<uint4*>(state.k_rows + offset) = *reinterpret_cast<const uint4*>(shared.k + offset);
  }
  for (int x = thread; x < added * kValueRowChunks; x += kChunkThreads) {
    const int offset = rows.first * kValueRowBytes + x * 16;
    *reinterpret_cast<uint4*>(state.bv_rows + offset) = *reinterpret_cast<const uint4*>(shared.bv + offset);
  }
  for (int row = rows.first + thread; row < rows.end; row += kChunkThreads) {
    state.scalars[kScalarG + row] = shared.g[row];
    state.scalars[kScalarScan + row] = shared.scan[row];
    state.scalars[kScalarBeta + row] = shared.beta[row];
  }
  const int r = rows.end / kBlock;
  const bool partial = rows.end % kBlock > 0;
  const int blocks = r * (r + 1) / 2 + (partial ? r + 1 : 0);
  for (int x = thread; x < blocks * (kBlockFloats / 4); x += kChunkThreads) {
    reinterpret_cast<float4*>(state.solve)[x] = reinterpret_cast<const float4*>(shared.inverse)[x];
  }
  if (!partial || r == 0) return;
  for (int x = thread; x < kBlockFloats / 4; x += kChunkThreads) {
    reinterpret_cast<float4*>(state.solve + kAdjacentBlock * kBlockFloats)[x] =
        reinterpret_cast<const float4*>(shared.Lower(r, r - 1))[x];
  }
}

__device__ void ComputeChunk(const GdnParams& params, const DevicePiece& piece, const DeviceTile& tile, int head,
                             char* record, ChunkShared& shared) {
  const ChunkRows rows = RowsOf(piece, tile);
  const HeadState state = StateOf(params, piece.slot, head);
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  LoadChunk(params, rows, state, head, shared);
  __syncthreads();
  ComputeScores(warp, lane, record, shared);
  if (thread < kGdnChunk) {
    float* exps = reinterpret_cast<float*>(record + kRecordExp);
    exps[thread] = shared.exp_g[thread];
    exps[kGdnChunk + thread] = Exp2(shared.scan[kGdnChunk - 1] - shared.scan[thread]);
    if (thread == 0) exps[2 * kGdnChunk] = shared.exp_g[kGdnChunk - 1];
  }
  __syncwarp();
  InvertDiagonal(warp, lane, shared);
  __syncthreads();
  if (warp >= 1) MergeAdjacent(warp, lane, shared);
  __syncthreads();
  // The rows of block row 2 or 3 that the next row of an open chunk will add to.
  float* keep = rows.open && rows.end / kBlock == warp ? state.solve + kInnerBlock * kBlockFloats : nullptr;
  if (warp == 2) MergeFar(2, 0, lane, shared, keep);
  if (warp == 3) MergeFar(3, 1, lane, shared, keep == nullptr ? nullptr : keep + kBlockFloats);
  __syncthreads();
  if (warp == 3) MergeFar(3, 0, lane, shared, keep);
  __syncthreads();
  uint32_t inverse[4][4][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int b = 0; b <= r; ++b) LoadInverse(inverse[r][b], shared.inverse[InverseBlock(r, b)], lane);
  }
  for (int unit = warp; unit < kValueTiles + kKeySteps; unit += kChunkThreads / 32) {
    if (unit < kValueTiles) {
      ComputeU(unit, lane, inverse, record, shared);
    } else {
      ComputeW(unit - kValueTiles, lane, inverse, record, shared);
    }
  }
  if (rows.open) StoreOpenChunk(rows, state, shared);
}

// Grid: (value_heads, tiles of the window), 128 threads.
// Traffic a tile and head: 36.9 KB + 12.3 KB of q read, 66.7 KB of record written.
__global__ void __launch_bounds__(kChunkThreads, 4)
    GdnChunkKernel(const __grid_constant__ GdnParams params, const __grid_constant__ Window window) {
  FollowPreviousKernel();
  extern __shared__ __align__(128) char memory[];
  ChunkShared& shared = *reinterpret_cast<ChunkShared*>(memory);
  const int head = blockIdx.x;
  const int index = window.begin + blockIdx.y;
  const DeviceTile tile = params.batch.tiles[index];
  if (tile.row_count == 0) return;
  const DevicePiece piece = params.batch.pieces[tile.piece];
  // A piece that starts and ends in mid-chunk reads the slot's open rows in its first tile and overwrites them in its
  // last: then one block does both, in this order.
  const int last_position = piece.position + piece.row_count - 1;
  const int first_index = index - (tile.position - piece.position / kGdnChunk * kGdnChunk) / kGdnChunk;
  const int last_index = first_index + last_position / kGdnChunk - piece.position / kGdnChunk;
  const bool ordered = piece.position % kGdnChunk != 0 && (last_position + 1) % kGdnChunk != 0 &&
                       first_index != last_index && first_index >= window.begin && last_index < window.end;
  if (ordered && index == last_index) return;
  const auto record = [&](int tile_index) {
    return window.records + (int64_t{tile_index - window.begin} * params.value_heads + head) * kRecordBytes;
  };
  ComputeChunk(params, piece, tile, head, record(index), shared);
  if (ordered && index == first_index) {
    __syncthreads();
    ComputeChunk(params, piece, params.batch.tiles[last_index], head, record(last_index), shared);
  }
}

// ---- Second kernel: the state through a piece's chunks.

constexpr int kScanWarps = 4;                        // a warp 16 columns of d_v
constexpr int kScanThreads = (kScanWarps + 1) * 32;  // and one that loads
constexpr int kScanSlices = kValueTiles / kScanWarps;
constexpr int kStages = 2;
constexpr int kSliceUBytes = kScanWarps * 4 * 512;
constexpr int kStageOperands = kRecordUsed - kRecordW;  // w, q, k, P and the exponentials: one piece of the record
constexpr int kStageBytes = (kSliceUBytes + kStageOperands + 127) / 128 * 128;
constexpr int kTurnPitch = 48;  // bytes of a row of 16 outputs while turned: conflict-free for stmatrix

struct ScanShared {
  alignas(128) char stages[kStages][kStageBytes];
  char turn[kScanWarps][kBlock * kTurnPitch];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

__device__ uint4 Lanes(const char* stage, int offset, int index, int lane) {
  return *reinterpret_cast<const uint4*>(stage + kSliceUBytes + (offset - kRecordW) + (index * 32 + lane) * 16);
}

__device__ float2 Exps(const char* stage, int index) {
  return *reinterpret_cast<const float2*>(stage + kSliceUBytes + (kRecordExp - kRecordW) + index * 4);
}

// bf16 operand {a0..a3} of two neighbouring accumulators.
__device__ void PackOperand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = PackBf16(left[0], left[1]);
  a[1] = PackBf16(left[2], left[3]);
  a[2] = PackBf16(right[0], right[1]);
  a[3] = PackBf16(right[2], right[3]);
}

// Lane's 16 bytes, row lane / 2 and half lane % 2, of a 16-row block that lies transposed (d_v x rows) in accumulators.
__device__ uint4 TurnBlock(char* turn, const uint32_t (&block)[4], int lane) {
  __syncwarp();
  StoreMatricesTransposed(SharedAddress(turn) + ((lane >> 4) * 8 + (lane & 7)) * kTurnPitch + ((lane >> 3) & 1) * 16,
                          block[0], block[1], block[2], block[3]);
  __syncwarp();
  return *reinterpret_cast<const uint4*>(turn + (lane >> 1) * kTurnPitch + (lane & 1) * 16);
}

// The first tile in the window of its piece number `number`, counted in the window; -1: it has fewer pieces.
__device__ int FirstTile(const DeviceTile* tiles, const Window& window, int number, int lane) {
  for (int base = window.begin; base < window.end; base += 32) {
    const int index = base + lane;
    bool starts = index < window.end && tiles[index].row_count > 0;
    if (starts && index > window.begin) starts = tiles[index - 1].piece != tiles[index].piece;
    const unsigned mask = __ballot_sync(0xFFFFFFFFu, starts);
    if (number < __popc(mask)) return base + static_cast<int>(__fns(mask, 0, number + 1));
    number -= __popc(mask);
  }
  return -1;
}

// Grid: (3 slices of d_v, value_heads, pieces of the window), 4 warps of 16 columns and a loading warp.
// Everything of a column stays in its warp: S and each product's result turn into the next product's operand in
// registers. Traffic a chunk and head: 66.7 KB of record (42 KB of it by all three slices), 24.6 KB written.
__global__ void __launch_bounds__(kScanThreads, 2)
    GdnScanKernel(const __grid_constant__ GdnParams params, const __grid_constant__ Window window) {
  FollowPreviousKernel();
  extern __shared__ __align__(128) char memory[];
  ScanShared& shared = *reinterpret_cast<ScanShared*>(memory);
  const int slice = blockIdx.x;
  const int head = blockIdx.y;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int first = FirstTile(params.batch.tiles, window, blockIdx.z, lane);
  if (first < 0) return;
  const DevicePiece piece = params.batch.pieces[params.batch.tiles[first].piece];
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      BarrierInit(&shared.full[stage], 1);
      BarrierInit(&shared.empty[stage], kScanWarps * kWarpArrivals);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int start = params.batch.tiles[first].position;
  const int piece_end = piece.position + piece.row_count;
  const int chunks = min((piece_end - 1) / kGdnChunk - start / kGdnChunk + 1, window.end - first);
  const char* records = window.records + (int64_t{first - window.begin} * params.value_heads + head) * kRecordBytes;
  const int64_t record_stride = int64_t{params.value_heads} * kRecordBytes;

  if (warp == kScanWarps) {
    if (lane != 0) return;
    for (int n = 0; n < chunks; ++n) {
      const int stage = n % kStages;
      if (n >= kStages) BarrierWait(&shared.empty[stage], (n / kStages - 1) & 1);
      const char* record = records + n * record_stride;
      BarrierArriveExpectBytes(&shared.full[stage], kSliceUBytes + kStageOperands);
      BulkCopy(record + kRecordW, shared.stages[stage] + kSliceUBytes, &shared.full[stage], kStageOperands);
      BulkCopy(record + kRecordU + slice * kSliceUBytes, shared.stages[stage], &shared.full[stage], kSliceUBytes);
    }
    return;
  }

  const HeadState state = StateOf(params, piece.slot, head);
  const int tile = slice * kScanWarps + warp;
  constexpr int kStateTiles = kGdnKeyDim / 8;
  float4* state_f32 = reinterpret_cast<float4*>(state.state_f32) + tile * kStateTiles * 32 + lane;
  float s[kStateTiles][4] = {};  // S^T: 16 columns of d_v x d_k
  if (start >= kGdnChunk) {
#pragma unroll
    for (int n = 0; n < kStateTiles; ++n) {
      const float4 x = state_f32[n * 32];
      s[n][0] = x.x;
      s[n][1] = x.y;
      s[n][2] = x.z;
      s[n][3] = x.w;
    }
  }
  char* turn = shared.turn[warp];
  const int pair = (lane & 3) * 2;
  const int turned_row = lane >> 1;
  const int turned_chunk = tile * 2 + (lane & 1);
  for (int n = 0; n < chunks; ++n) {
    const int chunk_start = start / kGdnChunk * kGdnChunk + n * kGdnChunk;
    const int row_first = max(start - chunk_start, 0);
    const int row_end = min(piece_end - chunk_start, kGdnChunk);
    const bool closed = row_end == kGdnChunk;
    uint32_t image[kKeySteps][4];
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) PackOperand(image[k], s[2 * k], s[2 * k + 1]);
    const char* stage = shared.stages[n % kStages];
    BarrierWait(&shared.full[n % kStages], (n / kStages) & 1);

    float v[8][4] = {};
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const uint4 w = Lanes(stage, kRecordW, k * 4 + b, lane);
        MmaBf16(v[2 * b], image[k], w.x, w.y);
        MmaBf16(v[2 * b + 1], image[k], w.z, w.w);
      }
    }
    uint32_t rounded[4][4];  // v' as an operand over the chunk's rows
    uint32_t decayed[4][4];  // v' exp2(G_63 - G_j)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint4 u4 = *reinterpret_cast<const uint4*>(stage + ((warp * 4 + b) * 32 + lane) * 16);
      const uint32_t u[4] = {u4.x, u4.y, u4.z, u4.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 decay = Exps(stage, kGdnChunk + b * kBlock + half * 8 + pair);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const float2 left = UnpackBf16(u[half * 2 + below]);
          const float x = left.x - v[2 * b + half][below * 2];
          const float y = left.y - v[2 * b + half][below * 2 + 1];
          rounded[b][half * 2 + below] = PackBf16(x, y);
          decayed[b][half * 2 + below] = PackBf16(x * decay.x, y * decay.y);
        }
      }
    }
    __nv_bfloat16* out = params.out + int64_t{head} * kGdnValueDim + turned_chunk * 8 +
                         (int64_t{piece.row_begin} + chunk_start - piece.position) * params.out_stride;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      if (b * kBlock >= row_end || (b + 1) * kBlock <= row_first) continue;
      float q_s[2][4] = {};
      float p_v[2][4] = {};
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k) {
        const uint4 q = Lanes(stage, kRecordQ, k * 4 + b, lane);
        MmaBf16(q_s[0], image[k], q.x, q.y);
        MmaBf16(q_s[1], image[k], q.z, q.w);
      }
#pragma unroll
      for (int c = 0; c <= b; ++c) {
        const uint4 p = Lanes(stage, kRecordP, LowerBlock(b, c), lane);
        MmaBf16(p_v[0], rounded[c], p.x, p.y);
        MmaBf16(p_v[1], rounded[c], p.z, p.w);
      }
      uint32_t o[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 exp_g = Exps(stage, b * kBlock + half * 8 + pair);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          o[half * 2 + below] = PackBf16(OutputElement(q_s[half][below * 2], exp_g.x, p_v[half][below * 2]),
                                         OutputElement(q_s[half][below * 2 + 1], exp_g.y, p_v[half][below * 2 + 1]));
        }
      }
      const uint4 turned = TurnBlock(turn, o, lane);
      const int row = b * kBlock + turned_row;
      if (row >= row_first && row < row_end) *reinterpret_cast<uint4*>(out + row * params.out_stride) = turned;
    }
    if (closed) {
      const float exp_last = Exps(stage, 2 * kGdnChunk).x;
#pragma unroll
      for (int k = 0; k < kStateTiles; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[k][e] = s[k][e] * exp_last;
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
#pragma unroll
        for (int k = 0; k < kKeySteps; ++k) {
          const uint4 keys = Lanes(stage, kRecordK, b * kKeySteps + k, lane);
          MmaBf16(s[2 * k], decayed[b], keys.x, keys.y);
          MmaBf16(s[2 * k + 1], decayed[b], keys.z, keys.w);
        }
      }
    } else {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const uint4 turned = TurnBlock(turn, rounded[b], lane);
        const int row = b * kBlock + turned_row;
        if (row >= row_first && row < row_end) {
          *reinterpret_cast<uint4*>(state.vp_rows + ValueOffset(row, turned_chunk)) = turned;
        }
      }
    }
    WarpArrive(&shared.empty[n % kStages]);
  }
  // A chunk was closed: the slot's S is that of another boundary.
  if (min(piece_end, start / kGdnChunk * kGdnChunk + chunks * kGdnChunk) / kGdnChunk == start / kGdnChunk) return;
  uint4* image_out = reinterpret_cast<uint4*>(state.image) + tile * kKeySteps * 32 + lane;
#pragma unroll
  for (int n = 0; n < kStateTiles; ++n) state_f32[n * 32] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
#pragma unroll
  for (int k = 0; k < kKeySteps; ++k) {
    uint32_t operand[4];
    PackOperand(operand, s[2 * k], s[2 * k + 1]);
    image_out[k * 32] = make_uint4(operand[0], operand[1], operand[2], operand[3]);
  }
}

constexpr int64_t kMaxGrid = 65535;

}  // namespace

int64_t GdnPrefillWorkspaceBytes(int64_t value_heads, int64_t tiles) {
  return value_heads * tiles * kRecordBytes;
}

absl::Status GdnPrefillParams::Validate() const {
  if (absl::Status status = gdn.Validate(); !status.ok()) return status;
  if (gdn.batch.tile_count == 0) return absl::OkStatus();
  if (absl::Status status = CheckPointer("GdnPrefillParams.workspace", workspace, 256); !status.ok()) return status;
  if (workspace_bytes < GdnPrefillWorkspaceBytes(gdn.value_heads, 1)) {
    return BadField("GdnPrefillParams.workspace_bytes", workspace_bytes,
                    "at least GdnPrefillWorkspaceBytes of one tile");
  }
  return absl::OkStatus();
}

absl::Status LaunchGdnPrefill(const GdnPrefillParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  const GdnParams& gdn = params.gdn;
  const int pieces = gdn.batch.piece_count - gdn.batch.decode_pieces;
  if (gdn.batch.tile_count == 0 || pieces == 0) return absl::OkStatus();
  const int64_t fitting = params.workspace_bytes / GdnPrefillWorkspaceBytes(gdn.value_heads, 1);
  const int step = static_cast<int>(std::min<int64_t>(fitting, kMaxGrid));
  for (int begin = 0; begin < gdn.batch.tile_count; begin += step) {
    const Window window = {.begin = begin,
                           .end = std::min(begin + step, gdn.batch.tile_count),
                           .records = static_cast<char*>(params.workspace)};
    const int tiles = window.end - window.begin;
    if (absl::Status status =
            LaunchKernel("GdnPrefill, chunks", GdnChunkKernel, dim3(gdn.value_heads, tiles), kChunkThreads,
                         sizeof(ChunkShared), LaunchOrder::kOverlapped, stream, gdn, window);
        !status.ok())
      return status;
    const dim3 scan_grid(kScanSlices, gdn.value_heads, std::min(pieces, tiles));
    if (absl::Status status = LaunchKernel("GdnPrefill, scan", GdnScanKernel, scan_grid, kScanThreads,
                                           sizeof(ScanShared), LaunchOrder::kAfter, stream, gdn, window);
        !status.ok())
      return status;
  }
  return absl::OkStatus();
}

}  // namespace lockstep::cuda

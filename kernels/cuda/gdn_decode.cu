#include <cmath>
#include <cstddef>
#include <type_traits>

#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_decode_norm.cuh"
#include "kernels/cuda/gdn_math.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

using namespace gdn;  // NOLINT(google-build-using-namespace): this file is that namespace's host

constexpr int kWarps = 6;  // each two tiles of 16 columns of d_v and one of d_k
constexpr int kThreads = kWarps * 32;
constexpr int kBlocksAMultiprocessor = 3;
constexpr int kBlocksAtOnce = kBlocksAMultiprocessor * kMultiprocessors;
constexpr int kTiles = kValueTiles / kWarps;
static_assert(kKeySteps == kWarps);
constexpr int kNormWarp = 4;  // the first of two, which have no part in a row's scores and in the solve

// Row-wise operands. A B operand needs its vector in one column only: here it is in all of them (or in every other
// one), so every lane of a quad holds the whole result and they share the work on it.
enum Vector { kRowK, kRowQ, kRowW };

// Of row t, while it is solved for.
struct SolveRow {
  float lower[kGdnChunk];  // row t of A, zero from t on
  float own[kBlock];       // row i of T's diagonal block
  float inner[kBlock];     // its product with A of (r, r-1)
};

struct DecodeShared {
  alignas(128) char k[kGdnKeyRowsBytes];
  char bv[kGdnValueRowsBytes];
  char vp[kGdnValueRowsBytes];  // at the chunk's end also w, in k's layout
  float solve[13][kBlockFloats];
  float scan[kGdnChunk];
  float exp_g[kGdnChunk];
  float beta[kGdnChunk];
  union {
    SolveRow solve_row;
    alignas(16) __nv_bfloat16 out[kGdnValueDim];  // o on its way to the norm, when the solve is over
  };
  __nv_bfloat16 vectors[3][kGdnKeyDim];  // row t of k, q and w
  __nv_bfloat16 inverse[kGdnChunk];      // row t of T
  __nv_bfloat16 weight[kGdnChunk];       // row t of decayed q k^T
  uint64_t rows_full;                    // k and the solve cache
  uint64_t values_full;                  // bv and vp
};
static_assert(sizeof(DecodeShared) + 1024 <= 228 * 1024 / kBlocksAMultiprocessor, "each block has 1 KB of its own");

// Row t = 16 r + i of its chunk, and the thread's place.
struct Row {
  int t;
  int r;
  int i;
  bool first_chunk;
  int thread;
  int warp;
  int lane;
  int g;        // lane / 4
  int pair;     // lane % 4 * 2
  bool below;   // of results {0} and {2} (rows g and g + 8), which this lane of its quad finishes
  int element;  // that row
};

__device__ void Unpack(uint32_t (&r)[4], uint4 x) {
  r[0] = x.x;
  r[1] = x.y;
  r[2] = x.z;
  r[3] = x.w;
}

__device__ uint32_t Pair(const __nv_bfloat16* vector) {
  return *reinterpret_cast<const uint32_t*>(vector);
}

// d += (row vector of 16) x (16 x 16 block), elements g {0} and g + 8 {2}.
template <MergeOrder kOrder>
__device__ void RowTimesBlock(float (&d)[4], const float* vector, const float* block, int lane) {
  const int g = lane >> 2;
  const int c = lane & 3;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int k0 = MergeTerm<kOrder>(s, c);
    const int k1 = MergeTerm<kOrder>(s, c + 4);
    const float a[4] = {block[BlockElement(k0, g)], block[BlockElement(k0, g + 8)], block[BlockElement(k1, g)],
                        block[BlockElement(k1, g + 8)]};
    MmaTf32(d, a, vector[k0], vector[k1]);
  }
}

// The chunk's end: S' from S, in the slot, and its image. Shared memory has all 64 rows of the chunk.
__device__ void CloseChunk(DecodeShared& shared, bool first_chunk, char* state_f32, char* image_bf16, int warp,
                           int lane) {
  const int pair = (lane & 3) * 2;
  // w of all rows: a warp 16 columns, turned from d_k x rows to rows of w in place of v'.
  {
    uint32_t keys[4][4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      LoadKeyColumnsB(keys[b], shared.k, b * kBlock, warp, lane);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int row = b * kBlock + (x & 1) * 8 + pair;
        keys[b][x] = GatedKeys(keys[b][x], *reinterpret_cast<const float2*>(shared.beta + row),
                               *reinterpret_cast<const float2*>(shared.exp_g + row));
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float w[2][4] = {};
#pragma unroll
      for (int b = 0; b <= r; ++b) {
        uint32_t inverse[4];
        LoadInverse(inverse, shared.solve[InverseBlock(r, b)], lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) MmaBf16(w[half], inverse, keys[b][2 * half], keys[b][2 * half + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int row = r * kBlock + (lane >> 2) + below * 8;
          *reinterpret_cast<uint32_t*>(shared.vp + KeyOffset(row, 2 * warp + half) + pair * 2) =
              PackBf16(w[half][below * 2], w[half][below * 2 + 1]);
        }
      }
    }
  }
  __syncthreads();
  const float scan_last = shared.scan[kGdnChunk - 1];
  const float exp_last = shared.exp_g[kGdnChunk - 1];
#pragma unroll 1
  for (int m = 0; m < kTiles; ++m) {
    const int tile = warp * kTiles + m;
    float4* state = reinterpret_cast<float4*>(state_f32) + tile * (kGdnKeyDim / 8) * 32 + lane;
    uint4* image = reinterpret_cast<uint4*>(image_bf16) + tile * kKeySteps * 32 + lane;
    uint32_t old[kKeySteps][4] = {};
    if (!first_chunk) {
#pragma unroll
      for (int k = 0; k < kKeySteps; ++k) Unpack(old[k], image[k * 32]);
    }
    uint32_t decayed[4][4];
    {
      uint32_t values[4][4];
#pragma unroll
      for (int b = 0; b < 4; ++b) LoadValueColumnsA(values[b], shared.bv, b * kBlock, tile, lane);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float u[2][4] = {};
#pragma unroll
        for (int b = 0; b <= r; ++b) {
          uint32_t inverse[4];
          LoadInverse(inverse, shared.solve[InverseBlock(r, b)], lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) MmaBf16(u[half], values[b], inverse[half], inverse[half + 2]);
        }
        float w_s[2][4] = {};
#pragma unroll
        for (int k = 0; k < kKeySteps; ++k) {
          uint32_t w[4];
          LoadKeyRows(w, shared.vp, r * kBlock, k, lane);
#pragma unroll
          for (int half = 0; half < 2; ++half) MmaBf16(w_s[half], old[k], w[half], w[half + 2]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 scan = *reinterpret_cast<const float2*>(shared.scan + r * kBlock + half * 8 + pair);
          const float2 decay = make_float2(Exp2(scan_last - scan.x), Exp2(scan_last - scan.y));
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const float2 left = UnpackBf16(PackBf16(u[half][below * 2], u[half][below * 2 + 1]));
            decayed[r][half * 2 + below] =
                PackBf16((left.x - w_s[half][below * 2]) * decay.x, (left.y - w_s[half][below * 2 + 1]) * decay.y);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
      float s[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (first_chunk) continue;
        const float4 x = state[(2 * k + half) * 32];
        s[half][0] = x.x * exp_last;
        s[half][1] = x.y * exp_last;
        s[half][2] = x.z * exp_last;
        s[half][3] = x.w * exp_last;
      }
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        uint32_t keys[4];
        LoadKeyColumnsB(keys, shared.k, b * kBlock, k, lane);
        MmaBf16(s[0], decayed[b], keys[0], keys[1]);
        MmaBf16(s[1], decayed[b], keys[2], keys[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state[(2 * k + half) * 32] = make_float4(s[half][0], s[half][1], s[half][2], s[half][3]);
      }
      image[k * 32] = make_uint4(PackBf16(s[0][0], s[0][1]), PackBf16(s[0][2], s[0][3]), PackBf16(s[1][0], s[1][1]),
                                 PackBf16(s[1][2], s[1][3]));
    }
  }
}

// A run of bytes from the slot into shared memory; none if bytes is 0.
struct Load {
  const void* from = nullptr;
  void* to = nullptr;
  uint32_t bytes = 0;
};

constexpr int kAdjacentLoads = 3;  // lanes: k, finished block rows, the open diagonal block, then these
constexpr int kInverseLoads = 3;
constexpr int kValueLoads = 2;
constexpr int kFirstValueLoad = 3 + kAdjacentLoads + kInverseLoads;
constexpr int kLoads = kFirstValueLoad + kValueLoads;

__device__ Load LoadOf(int which, const Row& row, const HeadState& state, DecodeShared& shared) {
  const auto rows = [&](const char* from, char* to, int row_bytes) {
    return Load{from, to, static_cast<uint32_t>(row.t * row_bytes)};
  };
  const auto solve = [&](int block, int bytes) {
    return Load{state.solve + block * kBlockFloats, shared.solve[block], static_cast<uint32_t>(bytes)};
  };
  const int open_bytes = row.i * kBlock * 4;
  if (which == 0) return rows(state.k_rows, shared.k, kKeyRowBytes);
  if (which == 1) return solve(0, row.r * (row.r + 1) / 2 * kBlockFloats * 4);
  if (which == 2) return solve(InverseBlock(row.r, row.r), open_bytes);
  if (which < 3 + kAdjacentLoads) return solve(kAdjacentBlock + which - 3, which - 3 < row.r ? open_bytes : 0);
  if (which < kFirstValueLoad) {
    const int x = which - 3 - kAdjacentLoads;
    return solve(InverseBlock(row.r, min(x, row.r)), x < row.r && row.t == kGdnChunk - 1 ? open_bytes : 0);
  }
  if (which == kFirstValueLoad) return rows(state.bv_rows, shared.bv, kValueRowBytes);
  if (which < kLoads) return rows(state.vp_rows, shared.vp, kValueRowBytes);
  return {};
}

// Warp 0: what is kept of the earlier rows into shared memory, a lane for each run: one thread issues 8 copies in a
// microsecond, a warp 32.
__device__ void StartLoads(const Row& row, const HeadState& state, DecodeShared& shared) {
  const Load load = LoadOf(row.lane, row, state, shared);
  const bool of_values = row.lane >= kFirstValueLoad;
  uint32_t row_bytes = of_values ? 0 : load.bytes;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) row_bytes += __shfl_xor_sync(0xFFFFFFFFu, row_bytes, distance);
  if (row.lane == 0) {
    BarrierInit(&shared.rows_full, 1);
    BarrierInit(&shared.values_full, 1);
    BarrierInitFence();
    BarrierArriveExpectBytes(&shared.rows_full, row_bytes);
    BarrierArriveExpectBytes(&shared.values_full, 2 * row.t * kValueRowBytes);
  }
  __syncwarp();
  if (load.bytes > 0) BulkCopy(load.from, load.to, of_values ? &shared.values_full : &shared.rows_full, load.bytes);
}

__device__ void LoadImage(const Row& row, const HeadState& state, uint32_t (&image)[kTiles][kKeySteps][4]) {
  const uint4* operands = reinterpret_cast<const uint4*>(state.image) + row.warp * kTiles * kKeySteps * 32 + row.lane;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) Unpack(image[m][k], __ldcs(operands + (m * kKeySteps + k) * 32));
  }
}

// One thread: the image of the block that takes this one's place into L2, so that memory is busy while the blocks that
// are there solve. Not its rows as well: with them it is slower, since L2 has to hold them for as long. And none for a
// block that ends its chunk: where all sequences do so at once, what they read and write pushes it out again.
__device__ void PrefetchNextImage(const GdnParams& params) {
  const int next = static_cast<int>(blockIdx.y) * params.value_heads + static_cast<int>(blockIdx.x) + kBlocksAtOnce;
  const int index = next / params.value_heads;
  if (index >= params.batch.decode_pieces) return;
  const DevicePiece piece = params.batch.pieces[index];
  if (piece.row_count == 0 || piece.position < kGdnChunk || piece.position % kGdnChunk == kGdnChunk - 1) return;
  BulkPrefetch(StateOf(params, piece.slot, next % params.value_heads).image, kGdnImageBytes);
}

// The row's own inputs, and the scalars, into shared memory and the slot; each warp its part.
__device__ void LoadInputs(const GdnParams& params, const Row& row, int64_t batch_row, int head, const HeadState& state,
                           DecodeShared& shared) {
  const int key_head = head / (params.value_heads / params.key_heads);
  if (row.warp == 1) {
    if (row.lane < kValueRowChunks) {
      const float beta = __bfloat162float(params.beta[batch_row * params.beta_stride + head]);
      const __nv_bfloat16* source = params.v + batch_row * params.v_stride + head * kGdnValueDim + row.lane * 8;
      uint4 v = *reinterpret_cast<const uint4*>(source);
      v = make_uint4(BetaValues(v.x, beta), BetaValues(v.y, beta), BetaValues(v.z, beta), BetaValues(v.w, beta));
      *reinterpret_cast<uint4*>(shared.bv + ValueOffset(row.t, row.lane)) = v;
      *reinterpret_cast<uint4*>(state.bv_rows + ValueOffset(row.t, row.lane)) = v;
    }
  } else if (row.warp == 2) {
    if (row.lane < kKeyRowChunks) {
      const __nv_bfloat16* source = params.k + batch_row * params.k_stride + key_head * kGdnKeyDim + row.lane * 8;
      const uint4 k = *reinterpret_cast<const uint4*>(source);
      *reinterpret_cast<uint4*>(shared.vectors[kRowK] + row.lane * 8) = k;
      *reinterpret_cast<uint4*>(shared.k + KeyOffset(row.t, row.lane)) = k;
      *reinterpret_cast<uint4*>(state.k_rows + KeyOffset(row.t, row.lane)) = k;
    }
  } else if (row.warp == 3) {
    if (row.lane < kKeyRowChunks) {
      const __nv_bfloat16* source = params.q + batch_row * params.q_stride + key_head * kGdnKeyDim + row.lane * 8;
      *reinterpret_cast<uint4*>(shared.vectors[kRowQ] + row.lane * 8) = *reinterpret_cast<const uint4*>(source);
    }
  } else if (row.warp == 4) {
    const float g_t = params.g[batch_row * params.g_stride + head];
    const float g_low = row.lane < row.t ? state.scalars[kScalarG + row.lane] : row.lane == row.t ? g_t : 0.0f;
    const float g_high = row.lane + 32 < row.t    ? state.scalars[kScalarG + row.lane + 32]
                         : row.lane + 32 == row.t ? g_t
                                                  : 0.0f;
    const float2 scan = ScanGates(g_low, g_high, row.lane);
    shared.scan[row.lane] = scan.x;
    shared.scan[row.lane + 32] = scan.y;
    shared.exp_g[row.lane] = Exp2(scan.x);
    shared.exp_g[row.lane + 32] = Exp2(scan.y);
    if (row.lane == (row.t & 31)) {
      state.scalars[kScalarG + row.t] = g_t;
      state.scalars[kScalarScan + row.t] = row.t < 32 ? scan.x : scan.y;
    }
  } else if (row.warp == 5) {
    const float beta = __bfloat162float(params.beta[batch_row * params.beta_stride + head]);
    shared.beta[row.lane] = row.lane < row.t ? state.scalars[kScalarBeta + row.lane] : row.lane == row.t ? beta : 0.0f;
    shared.beta[row.lane + 32] = row.lane + 32 < row.t    ? state.scalars[kScalarBeta + row.lane + 32]
                                 : row.lane + 32 == row.t ? beta
                                                          : 0.0f;
    if (row.lane == 0) state.scalars[kScalarBeta + row.t] = beta;
  }
}

// Zeros after the row to the end of its 16, and from row i on in the block row's blocks (row i is filled in later).
__device__ void ZeroMissing(const Row& row, DecodeShared& shared) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const int missing = kBlock - 1 - row.i;
  if (row.thread < missing * kKeyRowChunks) {
    *reinterpret_cast<uint4*>(shared.k + (row.t + 1) * kKeyRowBytes + row.thread * 16) = zero;
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int chunk = x * kThreads + row.thread;
    if (chunk < missing * kValueRowChunks) {
      *reinterpret_cast<uint4*>(shared.bv + (row.t + 1) * kValueRowBytes + chunk * 16) = zero;
      *reinterpret_cast<uint4*>(shared.vp + (row.t + 1) * kValueRowBytes + chunk * 16) = zero;
    }
  }
  constexpr int kBlockThreads = kThreads / 4;
  const int open_block = row.thread / kBlockThreads;
  float* diagonal = shared.solve[InverseBlock(row.r, row.r)];
  if (open_block <= row.r) {
    float* open_rows = (open_block == 0 ? diagonal : shared.solve[kAdjacentBlock + open_block - 1]) + row.i * kBlock;
    for (int x = row.thread % kBlockThreads; x < (kBlock - row.i) * 4; x += kBlockThreads) {
      reinterpret_cast<uint4*>(open_rows)[x] = zero;
    }
  }
}

// Warp b, for the 16 rows of block b: k k_t in even columns and k q_t in odd ones.
__device__ void ScoreRow(const Row& row, DecodeShared& shared) {
  float d[4] = {};
  const __nv_bfloat16* vector = shared.vectors[(row.g & 1) == 0 ? kRowK : kRowQ] + row.pair;
#pragma unroll
  for (int s = 0; s < kKeySteps; ++s) {
    uint32_t keys[4];
    LoadKeyRows(keys, shared.k, row.warp * kBlock, s, row.lane);
    MmaBf16(d, keys, Pair(vector + 16 * s), Pair(vector + 16 * s + 8));
  }
  const int j = row.warp * kBlock + row.element;
  const float decay = Exp2(shared.scan[row.t] - shared.scan[j]);
  if ((row.lane & 2) == 0) {
    shared.solve_row.lower[j] = j < row.t ? LowerElement(row.below ? d[2] : d[0], decay, shared.beta[row.t]) : 0.0f;
  } else {
    shared.weight[j] = __float2bfloat16_rn(j <= row.t ? (row.below ? d[3] : d[1]) * decay : 0.0f);
  }
}

// Warp 0: row i of T's diagonal block. Warps 1 and 2: row i of the inner sums of (r, 0) and (r, 1).
__device__ void SolveInner(const Row& row, const HeadState& state, DecodeShared& shared) {
  float* diagonal = shared.solve[InverseBlock(row.r, row.r)];
  float* adjacent = shared.solve[kAdjacentBlock];
  if (row.warp == 0) {
    const int x = row.lane & 15;
    float a[kBlock];
    float column[kBlock];
#pragma unroll
    for (int c = 0; c < kBlock; ++c) {
      a[c] = -shared.solve_row.lower[row.r * kBlock + c];
      column[c] = c == x ? 0.0f : diagonal[BlockElement(c, x)];
    }
    const float value =
        InverseElement(a, column, -shared.solve_row.lower[row.r * kBlock + x], x == row.i ? 1.0f : 0.0f);
    __syncwarp();
    if (row.lane < kBlock) {
      shared.solve_row.own[x] = value;
      diagonal[BlockElement(row.i, x)] = value;
      state.solve[InverseBlock(row.r, row.r) * kBlockFloats + BlockElement(row.i, x)] = value;
      shared.inverse[row.r * kBlock + x] = __float2bfloat16_rn(value);
    } else if (row.r > 0) {
      const float lower = shared.solve_row.lower[(row.r - 1) * kBlock + x];
      adjacent[BlockElement(row.i, x)] = lower;
      state.solve[kAdjacentBlock * kBlockFloats + BlockElement(row.i, x)] = lower;
    }
  } else if (row.warp < row.r) {
    const int q = row.warp - 1;
    float d[4] = {};
    for (int b = q; b < row.r; ++b) {
      RowTimesBlock<MergeOrder::kEvenOdd>(d, shared.solve_row.lower + b * kBlock, shared.solve[InverseBlock(b, q)],
                                          row.lane);
    }
    if ((row.lane & 2) == 0) {
      const int index = (kInnerBlock + q) * kBlockFloats + BlockElement(row.i, row.element);
      const float value = row.below ? d[2] : d[0];
      shared.solve[0][index] = value;
      state.solve[index] = value;
    }
  }
}

// Warp c < r: row i of T's block (r, c).
__device__ void SolveOuter(const Row& row, const HeadState& state, DecodeShared& shared) {
  const float* adjacent = shared.solve[kAdjacentBlock];
  float d[4] = {};
  if (row.warp == row.r - 1) {
    RowTimesBlock<MergeOrder::kEvenOdd>(d, shared.solve_row.own, adjacent, row.lane);
    if ((row.lane & 2) == 0) shared.solve_row.inner[row.element] = row.below ? d[2] : d[0];
    __syncwarp();
    d[0] = d[1] = d[2] = d[3] = 0.0f;
    RowTimesBlock<MergeOrder::kHalves>(d, shared.solve_row.inner, shared.solve[InverseBlock(row.r - 1, row.r - 1)],
                                       row.lane);
  } else {
    RowTimesBlock<MergeOrder::kHalves>(d, shared.solve_row.own, shared.solve[kInnerBlock + row.warp], row.lane);
  }
  if ((row.lane & 2) == 0) {
    const float value = -(row.below ? d[2] : d[0]);
    const int index = InverseBlock(row.r, row.warp) * kBlockFloats + BlockElement(row.i, row.element);
    shared.solve[0][index] = value;
    state.solve[index] = value;
    shared.inverse[row.warp * kBlock + row.element] = __float2bfloat16_rn(value);
  }
}

// u's and w's columns of the warp; w goes to shared memory, rounded.
__device__ void ComputeUW(const Row& row, DecodeShared& shared, float (&u)[kTiles][4]) {
  float w[4] = {};
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (b > row.r) break;
    const uint32_t b0 = Pair(shared.inverse + b * kBlock + row.pair);
    const uint32_t b1 = Pair(shared.inverse + b * kBlock + 8 + row.pair);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t values[4];
      LoadValueColumnsA(values, shared.bv, b * kBlock, row.warp * kTiles + m, row.lane);
      MmaBf16(u[m], values, b0, b1);
    }
    uint32_t keys[4];
    LoadKeyColumnsA(keys, shared.k, b * kBlock, row.warp, row.lane);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int j = b * kBlock + (x >> 1) * 8 + row.pair;
      keys[x] = GatedKeys(keys[x], *reinterpret_cast<const float2*>(shared.beta + j),
                          *reinterpret_cast<const float2*>(shared.exp_g + j));
    }
    MmaBf16(w, keys, b0, b1);
  }
  if ((row.lane & 2) == 0) {
    shared.vectors[kRowW][row.warp * 16 + row.element] = __float2bfloat16_rn(row.below ? w[2] : w[0]);
  }
}

// v' into shared memory and the slot, o into `out`, the head's row.
__device__ void FinishRow(const Row& row, const HeadState& state, const uint32_t (&image)[kTiles][kKeySteps][4],
                          const float (&u)[kTiles][4], DecodeShared& shared, __nv_bfloat16* out) {
  float s[kTiles][4] = {};  // w S in even columns, q S in odd ones
  const __nv_bfloat16* vector = shared.vectors[(row.g & 1) == 0 ? kRowW : kRowQ] + row.pair;
#pragma unroll
  for (int k = 0; k < kKeySteps; ++k) {
    const uint32_t b0 = Pair(vector + k * 16);
    const uint32_t b1 = Pair(vector + k * 16 + 8);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) MmaBf16(s[m], image[m][k], b0, b1);
  }
  // Lane 4g + c finishes column g + 8 (c % 2) of tile c / 2.
  static_assert(kTiles == 2);
  const bool second = (row.lane & 2) != 0;
  const auto mine = [&](const float(&tiles)[kTiles][4], int odd) {
    const float first_tile = row.below ? tiles[0][2 + odd] : tiles[0][odd];
    const float second_tile = row.below ? tiles[1][2 + odd] : tiles[1][odd];
    return second ? second_tile : first_tile;
  };
  const int column = (row.warp * kTiles + (row.lane >> 1 & 1)) * 16 + row.element;
  const __nv_bfloat16 v = __float2bfloat16_rn(__bfloat162float(__float2bfloat16_rn(mine(u, 0))) - mine(s, 0));
  const int v_offset = ValueOffset(row.t, column >> 3) + (column & 7) * 2;
  *reinterpret_cast<__nv_bfloat16*>(shared.vp + v_offset) = v;
  *reinterpret_cast<__nv_bfloat16*>(state.vp_rows + v_offset) = v;
  __syncwarp();
  float p_v[kTiles][4] = {};
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (b > row.r) break;
    const uint32_t b0 = Pair(shared.weight + b * kBlock + row.pair);
    const uint32_t b1 = Pair(shared.weight + b * kBlock + 8 + row.pair);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      uint32_t values[4];
      LoadValueColumnsA(values, shared.vp, b * kBlock, row.warp * kTiles + m, row.lane);
      MmaBf16(p_v[m], values, b0, b1);
    }
  }
  out[column] = __float2bfloat16_rn(OutputElement(mine(s, 1), shared.exp_g[row.t], mine(p_v, 0)));
}

// Grid: (value_heads, decode_pieces), 6 warps.
// Traffic a head at row t = 16 r + i of its chunk: 36.9 KB image, 960 t of rows, 1 KB of solve cache for each finished
// block and 64 i (1 + r) of the block row, 0.8 KB of scalars, 1.2 KB of inputs; written 1.3 KB and 64 (1 + 2 r). At
// t = 63 also S read and written and the image written, 184 KB. With a norm also 0.8 KB of gates and weights.
template <class Norm>
__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor)
    GdnDecodeKernel(const __grid_constant__ GdnParams params, const __grid_constant__ GdnOutputNorm output_norm) {
  constexpr bool kNormed = !std::is_same_v<Norm, NoNorm>;
  LetNextKernelStart();
  if (!params.early_start) AwaitPreviousKernel();
  extern __shared__ __align__(128) std::byte raw[];
  DecodeShared& shared = *reinterpret_cast<DecodeShared*>(raw);
  const DevicePiece piece = params.batch.pieces[blockIdx.y];
  if (piece.row_count == 0) {
    if (params.early_start) AwaitPreviousKernel();
    return;
  }
  const int head = blockIdx.x;
  const int t = piece.position % kGdnChunk;
  const int lane = threadIdx.x % 32;
  const Row row = {.t = t,
                   .r = t / kBlock,
                   .i = t % kBlock,
                   .first_chunk = piece.position < kGdnChunk,
                   .thread = static_cast<int>(threadIdx.x),
                   .warp = static_cast<int>(threadIdx.x) / 32,
                   .lane = lane,
                   .g = lane >> 2,
                   .pair = (lane & 3) * 2,
                   .below = (lane & 1) != 0,
                   .element = (lane >> 2) + (lane & 1) * 8};
  const HeadState state = StateOf(params, piece.slot, head);

  if (row.warp == 0) StartLoads(row, state, shared);
  uint32_t image[kTiles][kKeySteps][4] = {};
  if (!row.first_chunk) LoadImage(row, state, image);
  if (params.early_start) AwaitPreviousKernel();
  [[maybe_unused]] Norm norm;
  [[maybe_unused]] const NormPlace place = {.thread = row.thread - kNormWarp * 32, .lane = lane};
  if constexpr (kNormed) {
    const __nv_bfloat16* gate = output_norm.gate + piece.row_begin * output_norm.gate_stride + head * kGdnValueDim;
    // Ahead of the inputs, which these warps wait for: both waits are one.
    if (row.warp >= kNormWarp) norm.Load(output_norm, gate, place);
  }
  LoadInputs(params, row, piece.row_begin, head, state, shared);
  if (row.thread == kThreads - 1) PrefetchNextImage(params);
  ZeroMissing(row, shared);
  __syncthreads();
  BarrierWait(&shared.rows_full, 0);
  if (row.warp <= row.r) ScoreRow(row, shared);
  if constexpr (kNormed) {
    if (row.warp >= kNormWarp) norm.Prepare();
  }
  __syncthreads();
  SolveInner(row, state, shared);
  __syncthreads();
  if (row.warp < row.r) SolveOuter(row, state, shared);
  BarrierWait(&shared.values_full, 0);
  __syncthreads();
  float u[kTiles][4] = {};
  ComputeUW(row, shared, u);
  __syncthreads();
  __nv_bfloat16* out = params.out + piece.row_begin * params.out_stride + head * kGdnValueDim;
  FinishRow(row, state, image, u, shared, kNormed ? shared.out : out);
  if constexpr (kNormed) {
    __syncthreads();
    if (row.warp >= kNormWarp) {
      const Bf16s<kQuad> normed = norm.Finish(output_norm, shared.out, place);
      if (place.exists()) Store(normed, out + place.column());
    }
  }
  if (t != kGdnChunk - 1) return;
  if constexpr (!kNormed) __syncthreads();
  CloseChunk(shared, row.first_chunk, state.state_f32, state.image, row.warp, lane);
}

template <class Norm>
absl::Status LaunchDecode(const GdnParams& params, const GdnOutputNorm& norm, cudaStream_t stream) {
  if (params.batch.decode_pieces == 0) return absl::OkStatus();
  const dim3 grid(params.value_heads, params.batch.decode_pieces);
  // Blocks that are all there at once hide their slots' latency. Those of more only take memory's rate from the kernels
  // ahead, and at 128 sequences and more a step took longer.
  GdnParams launched = params;
  launched.early_start &= grid.x * grid.y <= kBlocksAtOnce;
  return LaunchKernel("GdnDecode", GdnDecodeKernel<Norm>, grid, kThreads, sizeof(DecodeShared),
                      LaunchOrder::kOverlapped, stream, launched, norm);
}

}  // namespace

absl::Status GdnOutputNorm::Validate(int32_t value_heads) const {
  constexpr int64_t kVector = 8;  // of the rows' alignment
  absl::Status status = CheckPointer("GdnOutputNorm.gate", gate, kVector * sizeof(*gate));
  status.Update(CheckPointer("GdnOutputNorm.weight", weight, kQuad * sizeof(float)));
  status.Update(CheckStride("GdnOutputNorm.gate_stride", gate_stride, int64_t{value_heads} * kGdnValueDim, kVector));
  if (!(eps >= 0.0f) || std::isinf(eps)) status.Update(BadField("GdnOutputNorm.eps", eps, "a finite value, 0 or more"));
  return status;
}

absl::Status LaunchGdnDecode(const GdnParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  return LaunchDecode<NoNorm>(params, {}, stream);
}

absl::Status LaunchGdnDecodeNorm(const GdnParams& params, const GdnOutputNorm& norm, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (absl::Status status = norm.Validate(params.value_heads); !status.ok()) return status;
  switch (norm.casts) {
    case GatedNormCasts::kThree:
      return LaunchDecode<TorchNorm<__nv_bfloat16>>(params, norm, stream);
    case GatedNormCasts::kTwo:
      return LaunchDecode<TorchNorm<float>>(params, norm, stream);
    case GatedNormCasts::kOne:
      return LaunchDecode<FusedNorm>(params, norm, stream);
  }
  return BadField("GdnOutputNorm.casts", static_cast<int>(norm.casts), "kThree, kTwo or kOne");
}

}  // namespace lockstep::cuda

#include <cmath>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kHeadDim = kDecodeHeadDim;
constexpr int kBlock = kDecodeBlock;
constexpr int kColumns = kDecodeColumns;
constexpr int kMathWarps = 4;
constexpr int kThreads = (kMathWarps + 1) * 32;
// Of 16 KB each: what a multiprocessor's blocks have in flight together, whether they are three, two or one.
constexpr int kSlotsPerSm = 12;
constexpr int kScorePad = 8;  // floats: keeps the columns' rows of scores in different banks

template <class Order, int kSlots>
struct DecodeShared {
  alignas(1024) std::byte slots[kSlots][kDecodeBlockBytes];
  float scores[2][kColumns][Order::kKeys + kScorePad];
  uint64_t full[kSlots];
  uint64_t empty[kSlots];
};

// The loading warp: blocks of a tile's keys, then of its values.
template <class Order, int kSlots>
__device__ void Load(const AttentionArgs& args, const DevicePiece& piece, const KeyRange<Order>& range, int first_step,
                     int kv_head, DecodeShared<Order, kSlots>& shared) {
  constexpr int kHalves = Order::kKeys / kBlock;
  PageCursor<Order> cursor(args, piece, range);
  RingIndex<kSlots> ring;
  for (int step = first_step; step < range.tiles; ++step) {
    const int tile = range.Tile(step);
#pragma unroll
    for (int unit = 0; unit < 2 * kHalves; ++unit) {
      const int block = tile * kHalves + unit % kHalves;
      if (!range.HasBlock(block)) continue;
      const int head = unit < kHalves ? kv_head : args.kv_heads + kv_head;
      const int row = cursor.Row(block) + head * args.page_size;
      if (threadIdx.x % 32 == 0) {
        BarrierWait(&shared.empty[ring.slot], ring.phase ^ 1);
        BarrierArriveExpectBytes(&shared.full[ring.slot], kDecodeBlockBytes);
        BulkCopy(args.kv + row * kKvRowBytes, shared.slots[ring.slot], &shared.full[ring.slot], kDecodeBlockBytes);
      }
      ring.Next();
    }
  }
}

// Whether a piece's first `shared` positions are another kernel's, which has left what they give in shared_rows. Not
// where the window cuts them off.
__device__ bool IsShared(const AttentionArgs& args, const DevicePiece& piece) {
  return args.shared_rows != nullptr && piece.shared > 0 && (args.window == 0 || piece.position < args.window);
}

// The rows that a block computes, the columns of its products, and the keys they see.
struct Columns {
  DevicePiece piece;  // whose pages hold the keys, up to its position; row_count 0: nothing to do
  int kv_head;
  int64_t first_head;
  int count;
  int window;
  const DeviceShare* share = nullptr;  // null: `count` heads from first_head on, all of `piece`; else one head of each

  // Block (x, y) of a grid (kv_heads * groups of 8 query heads, decode_pieces).
  __device__ static Columns OfPiece(const AttentionArgs& args) {
    Columns columns;
    columns.piece = args.batch.pieces[blockIdx.y];
    columns.kv_head = static_cast<int>(blockIdx.x) % args.kv_heads;
    const int first_column = static_cast<int>(blockIdx.x) / args.kv_heads * kColumns;
    columns.first_head = static_cast<int64_t>(columns.kv_head) * args.group + first_column;
    columns.count = min(kColumns, args.group - first_column);
    columns.window = args.window;
    return columns;
  }
  // Block (x, y) of a grid (kv_heads, share_count), one query head a kv head.
  __device__ static Columns OfShare(const AttentionArgs& args) {
    Columns columns;
    columns.share = &args.batch.shares[blockIdx.y];
    columns.count = columns.share->count;
    bool any = false;
    for (int i = 0; i < columns.count; ++i) any |= IsShared(args, args.batch.pieces[columns.share->pieces[i]]);
    if (any) columns.piece = args.batch.pieces[columns.share->pieces[0]];
    columns.piece.position = columns.share->positions - 1;
    columns.kv_head = static_cast<int>(blockIdx.x);
    columns.first_head = columns.kv_head;
    columns.window = 0;  // wider than what is shared, for those that take part
    return columns;
  }
  __device__ DevicePiece Piece(const AttentionArgs& args, int column) const {
    return share == nullptr ? piece : args.batch.pieces[share->pieces[column]];
  }
  __device__ int64_t Head(int column) const { return share == nullptr ? first_head + column : first_head; }
};

// 4 warps of mathematics and one that loads.
// A block walks its keys tile by tile: the warps share a tile's keys for the scores, and the head dimension for the
// sum over the values; every warp computes all the weights. Keys are the rows of the first product and dims those of
// the second, so that up to 8 columns cost what one costs: query heads of one kv head or, with kShare, the pieces of a
// DeviceShare, whose states after the shared tiles go to shared_rows, where each piece's own block finds them.
// Columns never meet in any sum: what a column gives does not depend on the others.
// Traffic: the keys and values that the piece sees, 512 bytes a position and kv head, each once; of a share once for
// all its pieces, and 2 x 544 bytes a piece and head.
template <class Order, bool kShare, int kSlots>
__device__ __forceinline__ void DecodeTiles(const AttentionArgs& args) {
  constexpr int kKeys = Order::kKeys;
  constexpr int kHalves = kKeys / kBlock;
  constexpr int kRowTiles = kKeys / (16 * kMathWarps);  // of 16 keys, a warp
  constexpr int kDimTiles = kHeadDim / (16 * kMathWarps);
  static_assert(!kShare || Order::kForward, "the first tiles are those at the front");
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<DecodeShared<Order, kSlots>*>(raw);
  FollowPreviousKernel();
  const Columns work = kShare ? Columns::OfShare(args) : Columns::OfPiece(args);
  const DevicePiece& piece = work.piece;
  if (piece.row_count == 0) return;
  const int columns = work.count;
  const KeyRange<Order> range(piece.position, work.window);
  const bool resumes = !kShare && Order::kForward && IsShared(args, piece);
  const int first_step = resumes ? piece.shared / kKeys : 0;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], kMathWarps * kWarpArrivals);
    }
    BarrierInitFence();
  }
  __syncthreads();
  if (warp == kMathWarps) {
    Load(args, piece, range, first_step, work.kv_head, shared);
    return;
  }

  const int group_row = lane / 4;
  const int quad = lane % 4;
  // Of a second operand this thread holds column lane / 4; the columns past the last repeat it, unused.
  const int column = min(group_row, columns - 1);
  uint32_t q[16];
  LoadQueries(args, work.Piece(args, column), work.Head(column), q);
  const int64_t heads = static_cast<int64_t>(args.kv_heads) * args.group;
  const int dim = warp * kDimTiles * 16 + group_row;  // this thread's of the output: + 16 d and + 16 d + 8

  float row_max = -INFINITY;
  RowSum<Order> sum;
  float o[kDimTiles][4] = {};
  if (resumes) {
    // One query head a kv head, so every column is that one.
    const RowState& state = args.shared_rows[static_cast<int64_t>(blockIdx.y) * heads + work.first_head];
    row_max = state.max;
    sum = RowSum<Order>(state.sums[quad]);
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[d][i] = state.o[dim + 16 * d + i / 2 * 8];
    }
  }
  RingIndex<kSlots> ring;
  for (int step = first_step; step < range.tiles; ++step) {
    const int tile = range.Tile(step);
    const int tile_begin = tile * kKeys;
    auto& scores = shared.scores[step & 1];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (!range.HasBlock(tile * kHalves + half)) continue;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int key = (warp * kRowTiles + r) * 16;
        if (key / kBlock != half) continue;
        if (r == 0) BarrierWait(&shared.full[ring.slot], ring.phase);
        float s[4];
        Scores16(shared.slots[ring.slot], key % kBlock, q, s);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (2 * quad + i % 2 < columns) scores[2 * quad + i % 2][key + group_row + i / 2 * 8] = s[i];
        }
      }
      WarpArrive(&shared.empty[ring.slot]);
      ring.Next();
    }
    // One barrier a tile: the scores alternate between two places.
    NamedBarrier(1, kMathWarps * 32);

    // This thread's keys 2 quad, 2 quad + 1 of every 8, of its column.
    float s[kKeys / 4];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(&scores[column][8 * i + 2 * quad]);
      s[2 * i] = pair.x;
      s[2 * i + 1] = pair.y;
    }
    if (tile_begin < range.first_key || tile_begin + kKeys - 1 > piece.position) {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const int key = tile_begin + i / 2 * 8 + 2 * quad + i % 2;
        if (key < range.first_key || key > piece.position) s[i] = -INFINITY;
      }
    }
    float tile_max = s[0];
#pragma unroll
    for (int i = 1; i < kKeys / 4; ++i) tile_max = fmaxf(tile_max, s[i]);
    const TileFactors factors = NextTile<Order>(row_max, QuadMax(tile_max), args.exponent);
    sum.BeginTile(factors.rescale);
    uint32_t p[kKeys / 8];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const float low = Weight<Order>(s[2 * i], factors, args.exponent);
      const float high = Weight<Order>(s[2 * i + 1], factors, args.exponent);
      sum.Add(low);
      sum.Add(high);
      p[i] = PackBf16(low, high);
    }
    sum.EndTile();
    // Of the output this thread holds columns 2 quad and 2 quad + 1.
    const float rescale_low = __shfl_sync(0xFFFFFFFFu, factors.rescale, 8 * quad);
    const float rescale_high = __shfl_sync(0xFFFFFFFFu, factors.rescale, 8 * quad + 4);
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
      o[d][0] = __fmul_rn(o[d][0], rescale_low);
      o[d][1] = __fmul_rn(o[d][1], rescale_high);
      o[d][2] = __fmul_rn(o[d][2], rescale_low);
      o[d][3] = __fmul_rn(o[d][3], rescale_high);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int block = tile * kHalves + half;
      if (!range.HasBlock(block)) continue;
      BarrierWait(&shared.full[ring.slot], ring.phase);
      const uint32_t base = SharedAddress(shared.slots[ring.slot]);
#pragma unroll
      for (int g = 0; g < kBlock / 16; ++g) {
        const int key = block * kBlock + g * 16;
        if (key > piece.position) break;
#pragma unroll
        for (int d = 0; d < kDimTiles; ++d) {
          const int chunk = (warp * kDimTiles + d) * 2 + lane / 8 % 2;
          uint32_t a[4];
          LoadMatricesTransposed(a, base + BlockOffset(g * 16 + lane / 16 * 8 + lane % 8, chunk));
          KeepWrittenValues(a, key, piece.position);
          Mma16(o[d], a, p[half * (kBlock / 8) + 2 * g], p[half * (kBlock / 8) + 2 * g + 1]);
        }
      }
      WarpArrive(&shared.empty[ring.slot]);
      ring.Next();
    }
  }

  if constexpr (kShare) {
    const auto state = [&](int c) -> RowState& {
      return args.shared_rows[work.share->pieces[c] * heads + work.first_head];
    };
    if (warp == 0 && group_row < columns) {
      state(group_row).sums[quad] = sum.partial();
      if (quad == 0) state(group_row).max = row_max;
    }
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = 2 * quad + i % 2;
        if (to < columns) state(to).o[dim + 16 * d + i / 2 * 8] = o[d][i];
      }
    }
    return;
  }
  const float inverse = sum.Inverse();
  const float inverses[2] = {__shfl_sync(0xFFFFFFFFu, inverse, 8 * quad),
                             __shfl_sync(0xFFFFFFFFu, inverse, 8 * quad + 4)};
  __nv_bfloat16* out = args.out + piece.row_begin * args.out_stride + work.first_head * kHeadDim;
#pragma unroll
  for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int to = 2 * quad + i % 2;
      if (to >= columns) continue;
      out[to * kHeadDim + dim + 16 * d + i / 2 * 8] = __float2bfloat16_rn(__fmul_rn(o[d][i], inverses[i % 2]));
    }
  }
}

template <class Order, int kSlots>
__global__ void __launch_bounds__(kThreads, kSlotsPerSm / kSlots)
    DecodeKernel(const __grid_constant__ AttentionArgs args) {
  DecodeTiles<Order, false, kSlots>(args);
}

// A kernel of its own, so that profiles tell it apart.
template <class Order, int kSlots>
__global__ void __launch_bounds__(kThreads, kSlotsPerSm / kSlots)
    DecodeSharedKernel(const __grid_constant__ AttentionArgs args) {
  DecodeTiles<Order, true, kSlots>(args);
}

template <class Order, bool kShare, int kSlots>
absl::Status LaunchRing(dim3 grid, const AttentionArgs& args, cudaStream_t stream) {
  const auto launch = [&](const char* name, auto kernel) {
    return LaunchKernel(name, kernel, grid, kThreads, sizeof(DecodeShared<Order, kSlots>), LaunchOrder::kOverlapped,
                        stream, args);
  };
  if constexpr (kShare) {
    return launch("AttentionDecodeShared", DecodeSharedKernel<Order, kSlots>);
  } else {
    return launch("AttentionDecode", DecodeKernel<Order, kSlots>);
  }
}

// The fewer blocks share a multiprocessor, the more of its copies each must have in flight.
template <class Order, bool kShare>
absl::Status LaunchBlocks(dim3 grid, const AttentionArgs& args, cudaStream_t stream) {
  const int64_t blocks = int64_t{grid.x} * grid.y;
  if (blocks <= kMultiprocessors) return LaunchRing<Order, kShare, kSlotsPerSm>(grid, args, stream);
  if (blocks <= 2 * kMultiprocessors) return LaunchRing<Order, kShare, kSlotsPerSm / 2>(grid, args, stream);
  return LaunchRing<Order, kShare, kSlotsPerSm / 3>(grid, args, stream);
}

template <class Order>
absl::Status Launch(const AttentionParams& params, cudaStream_t stream) {
  AttentionArgs args = MakeAttentionArgs(params);
  if constexpr (Order::kForward) {
    if (params.batch.share_count > 0 && params.workspace != nullptr && params.heads == params.kv.kv_heads) {
      args.shared_rows = static_cast<RowState*>(params.workspace);
      const dim3 grid(static_cast<unsigned>(params.kv.kv_heads), static_cast<unsigned>(params.batch.share_count));
      if (absl::Status status = LaunchBlocks<Order, true>(grid, args, stream); !status.ok()) return status;
    }
  }
  const dim3 grid(static_cast<unsigned>(DecodeUnits(params.heads, params.kv.kv_heads)),
                  static_cast<unsigned>(params.batch.decode_pieces));
  return LaunchBlocks<Order, false>(grid, args, stream);
}

}  // namespace

absl::Status LaunchAttentionDecode(const AttentionParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.batch.decode_pieces == 0) return absl::OkStatus();
  if (params.workspace != nullptr && DecodeIsSpread(params.batch.decode_pieces, params.heads, params.kv.kv_heads)) {
    return LaunchAttentionDecodeSpread(params, stream);
  }
  switch (params.program) {
    case AttentionProgram::kCudnn:
      return Launch<CudnnOrder>(params, stream);
    case AttentionProgram::kFa2:
      return Launch<Fa2Order>(params, stream);
    case AttentionProgram::kCudnnMask:
      return Launch<CudnnMaskOrder>(params, stream);
  }
  return absl::InternalError("unreachable: Validate() knows the programs");
}

}  // namespace lockstep::cuda

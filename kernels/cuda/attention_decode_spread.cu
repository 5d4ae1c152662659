// Decode for few sequences, in three kernels: all scores, blocks spread over the key tiles; all weights, likewise, once
// every tile's maximum is known; then the sums over the tiles in the row's order, a block for a half or a quarter of
// the head dimension. Scores and weights go through memory once, fp32.
#include <cmath>

#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kHeadDim = kDecodeHeadDim;
constexpr int kBlock = kDecodeBlock;
constexpr int kColumns = kDecodeColumns;
constexpr int64_t kScoreBlocks = 3 * 132;  // at once on the card
constexpr int64_t kSpreadUnits = 66;       // two blocks each, or four of half as many, are one for a multiprocessor

struct SpreadArgs {
  AttentionArgs attention;
  float* records;        // [units, tiles_a_unit]: of the unit's tiles in the row's order
  int32_t tiles_a_unit;  // at most
  int32_t columns;       // of a record
};

// A tile's record: scores [columns, kKeys], -infinity where the row sees no key, then weights in their place; the
// columns' maxima [8]; the factors [8] by which what came before changes first.
template <class Order>
__host__ __device__ constexpr int64_t RecordFloats(int64_t columns) {
  return columns * Order::kKeys + 2 * kColumns;
}

template <class Order>
__device__ float* Record(const SpreadArgs& args, int step) {
  const int64_t unit = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  return args.records + (unit * args.tiles_a_unit + step) * RecordFloats<Order>(args.columns);
}

// What a unit, block (blockIdx.x, blockIdx.y) of the grid, works on.
struct Unit {
  DevicePiece piece;
  int kv_head;
  int columns;
  int64_t first_head;

  __device__ explicit Unit(const AttentionArgs& args) : piece(args.batch.pieces[blockIdx.y]) {
    kv_head = static_cast<int>(blockIdx.x) % args.kv_heads;
    const int first_column = static_cast<int>(blockIdx.x) / args.kv_heads * kColumns;
    columns = min(kColumns, args.group - first_column);
    first_head = static_cast<int64_t>(kv_head) * args.group + first_column;
  }
};

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = (kScoreWarps + 1) * 32;
constexpr int kScoreSlots = 4;

struct ScoreShared {
  alignas(1024) std::byte slots[kScoreSlots][kDecodeBlockBytes];
  float maxima[2][kScoreWarps][kColumns];
  uint64_t full[kScoreSlots];
  uint64_t empty[kScoreSlots];
};

// Grid: (kv_heads * groups of 8 query heads, decode_pieces, splits), 4 warps of mathematics and one that loads; a block
// takes every splits-th tile. Traffic: the piece's keys once, 4 bytes a key and query head written.
template <class Order>
__global__ void __launch_bounds__(kScoreThreads, 3) ScoreKernel(const __grid_constant__ SpreadArgs spread) {
  constexpr int kKeys = Order::kKeys;
  constexpr int kHalves = kKeys / kBlock;
  constexpr int kRowTiles = kKeys / (16 * kScoreWarps);
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<ScoreShared*>(raw);
  const AttentionArgs& args = spread.attention;
  FollowPreviousKernel();
  const Unit unit(args);
  if (unit.piece.row_count == 0) return;
  const KeyRange<Order> range(unit.piece.position, args.window);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kScoreSlots; ++i) {
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.empty[i], kScoreWarps * kWarpArrivals);
    }
    BarrierInitFence();
  }
  __syncthreads();
  RingIndex<kScoreSlots> ring;

  if (warp == kScoreWarps) {
    PageCursor<Order> cursor(args, unit.piece, range);
    for (int step = static_cast<int>(blockIdx.z); step < range.tiles; step += static_cast<int>(gridDim.z)) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int block = range.Tile(step) * kHalves + half;
        if (!range.HasBlock(block)) continue;
        const int row = cursor.Row(block) + unit.kv_head * args.page_size;
        if (lane == 0) {
          BarrierWait(&shared.empty[ring.slot], ring.phase ^ 1);
          BarrierArriveExpectBytes(&shared.full[ring.slot], kDecodeBlockBytes);
          BulkCopy(args.kv + row * kKvRowBytes, shared.slots[ring.slot], &shared.full[ring.slot], kDecodeBlockBytes);
        }
        ring.Next();
      }
    }
    return;
  }

  uint32_t q[16];
  LoadQueries(args, unit.piece, unit.first_head + min(lane / 4, unit.columns - 1), q);
  int buffer = 0;
  for (int step = static_cast<int>(blockIdx.z); step < range.tiles; step += static_cast<int>(gridDim.z)) {
    const int tile = range.Tile(step);
    float* record = Record<Order>(spread, step);
    float maxima[2] = {-INFINITY, -INFINITY};  // of columns 2 (lane % 4) and the next
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const bool loaded = range.HasBlock(tile * kHalves + half);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int row = (warp * kRowTiles + r) * 16;
        if (row / kBlock != half) continue;
        float s[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (loaded) {
          if (r == 0) BarrierWait(&shared.full[ring.slot], ring.phase);
          Scores16(shared.slots[ring.slot], row % kBlock, q, s);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = row + lane / 4 + i / 2 * 8;
          const int position = tile * kKeys + key;
          if (position < range.first_key || position > unit.piece.position) s[i] = -INFINITY;
          maxima[i % 2] = fmaxf(maxima[i % 2], s[i]);
          const int column = 2 * (lane % 4) + i % 2;
          if (column < unit.columns) record[column * kKeys + key] = s[i];
        }
      }
      if (!loaded) continue;
      WarpArrive(&shared.empty[ring.slot]);
      ring.Next();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(0xFFFFFFFFu, maxima[i], distance));
      }
      if (lane < 4) shared.maxima[buffer][warp][2 * lane + i] = maxima[i];
    }
    NamedBarrier(1, kScoreWarps * 32);
    if (threadIdx.x < kColumns) {
      float all = shared.maxima[buffer][0][threadIdx.x];
      for (int w = 1; w < kScoreWarps; ++w) all = fmaxf(all, shared.maxima[buffer][w][threadIdx.x]);
      record[spread.columns * kKeys + threadIdx.x] = all;
    }
    buffer ^= 1;
  }
}

constexpr int kWeighTiles = 8;  // of a block, a warp each

// Grid: (kv_heads * groups of 8 query heads, decode_pieces, tiles in eights). A maximum is the same in whatever order
// it is taken, so a tile's factors need no walk along the row. Traffic: 8 bytes a key and query head, and 32 bytes for
// each of a block's earlier tiles, from L2.
template <class Order>
__global__ void __launch_bounds__(kWeighTiles * 32) WeighKernel(const __grid_constant__ SpreadArgs spread) {
  constexpr int kKeys = Order::kKeys;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& before = *reinterpret_cast<float(*)[kWeighTiles][kColumns]>(raw);  // maxima: a warp's share of earlier tiles
  FollowPreviousKernel();
  const Unit unit(spread.attention);
  if (unit.piece.row_count == 0) return;
  const KeyRange<Order> range(unit.piece.position, spread.attention.window);
  const int first = static_cast<int>(blockIdx.z) * kWeighTiles;
  if (first >= range.tiles) return;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int maxima = spread.columns * kKeys;

  float most = -INFINITY;
  for (int step = static_cast<int>(threadIdx.x) / kColumns; step < first; step += kWeighTiles * 32 / kColumns) {
    most = fmaxf(most, Record<Order>(spread, step)[maxima + lane % kColumns]);
  }
#pragma unroll
  for (int distance = kColumns; distance < 32; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, distance));
  }
  if (lane < kColumns) before[warp][lane] = most;
  __syncthreads();

  const int step = first + warp;
  if (step >= range.tiles) return;
  float* record = Record<Order>(spread, step);
  for (int column = 0; column < unit.columns; ++column) {
    float row_max = -INFINITY;
    for (int w = 0; w < kWeighTiles; ++w) row_max = fmaxf(row_max, before[w][column]);
    for (int s = first; s < step; ++s) row_max = fmaxf(row_max, Record<Order>(spread, s)[maxima + column]);
    const TileFactors factors = NextTile<Order>(row_max, record[maxima + column], spread.attention.exponent);
    for (int key = lane; key < kKeys; key += 32) {
      float& score = record[column * kKeys + key];
      score = Weight<Order>(score, factors, spread.attention.exponent);
    }
    if (lane == 0) record[maxima + kColumns + column] = factors.rescale;
  }
}

// Warps: loading, summing, values.
constexpr int kSumWarp = 1;
constexpr int kFirstValueWarp = kSumWarp + 1;
constexpr size_t kRingBytes = 222 << 10;

// An order whose values are taken in so many parts of the head dimension, a block each.
template <class Order, int kParts_>
struct Parts : Order {
  static constexpr int kParts = kParts_;
  static constexpr int kBlocks = Order::kKeys / kBlock;                    // of a tile
  static constexpr int kBytes = static_cast<int>(kKvBlockBytes) / kParts;  // of a block of values: whole planes
  static constexpr int kValueWarps = kHeadDim / kParts / 16;
  static constexpr int kThreads = (kFirstValueWarp + kValueWarps) * 32;
};

template <class Order>
struct ValueStage {
  alignas(512) std::byte v[Order::kBlocks][Order::kBytes];
  float record[RecordFloats<Order>(kColumns)];
};

template <class Order>
struct ValueShared {
  static constexpr int kStages = static_cast<int>(kRingBytes / sizeof(ValueStage<Order>));

  ValueStage<Order> stages[kStages];
  float inverse[kColumns];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t summed;  // `inverse` is there
};

// The loading warp: of every tile its part of each block of values, and the record. A lane for each copy: one thread
// issues 8 copies in a microsecond, a warp 32. A block of threads gets 57 GB/s at most.
template <class Order>
__device__ void LoadValues(const SpreadArgs& spread, const Unit& unit, const KeyRange<Order>& range,
                           ValueShared<Order>& shared) {
  const AttentionArgs& args = spread.attention;
  const auto record_bytes = static_cast<uint32_t>(RecordFloats<Order>(spread.columns) * sizeof(float));
  const std::byte* values = args.kv + (args.kv_heads + unit.kv_head) * args.page_size * kKvRowBytes +
                            static_cast<int>(blockIdx.z) * Order::kBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool of_record = lane == Order::kBlocks;
  PageCursor<Order> cursor(args, unit.piece, range);
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step) {
    const int first_block = range.Tile(step) * Order::kBlocks;
    int row = 0;  // of this lane's block
#pragma unroll
    for (int i = 0; i < Order::kBlocks; ++i) {
      const int at = cursor.Row(first_block + i);
      if (i == lane) row = at;
    }
    if (lane <= Order::kBlocks) {
      auto& stage = shared.stages[ring.slot];
      const void* from = of_record ? static_cast<const void*>(Record<Order>(spread, step)) : values + row * kKvRowBytes;
      void* to = of_record ? static_cast<void*>(stage.record) : stage.v[lane];
      uint64_t* full = &shared.full[ring.slot];
      uint32_t bytes = of_record ? record_bytes : Order::kBytes;
      if (!of_record && !range.HasBlock(first_block + lane)) bytes = 0;
      BarrierWait(&shared.empty[ring.slot], ring.phase ^ 1);
      BarrierArriveExpectBytes(full, bytes);
      if (bytes > 0) BulkCopy(from, to, full, bytes);
    }
    ring.Next();
  }
}

// A warp: the sums of the weights.
template <class Order>
__device__ void Sum(const SpreadArgs& spread, const Unit& unit, const KeyRange<Order>& range,
                    ValueShared<Order>& shared) {
  constexpr int kKeys = Order::kKeys;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int column = min(lane / 4, unit.columns - 1);
  RowSum<Order> sum;
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step) {
    const float* record = shared.stages[ring.slot].record;
    BarrierWait(&shared.full[ring.slot], ring.phase);
    float2 weights[kKeys / 8];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      weights[i] = *reinterpret_cast<const float2*>(&record[column * kKeys + 8 * i + 2 * (lane % 4)]);
    }
    sum.BeginTile(record[spread.columns * kKeys + kColumns + column]);
    WarpArrive(&shared.empty[ring.slot]);
    ring.Next();
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      sum.Add(weights[i].x);
      sum.Add(weights[i].y);
    }
    sum.EndTile();
  }
  const float inverse = sum.Inverse();
  if (lane % 4 == 0) shared.inverse[lane / 4] = inverse;
  WarpArrive(&shared.summed);
}

// What a tile brings to 16 dims of the output: both operands of its products.
template <class Order>
struct ValueOperands {
  uint32_t v[Order::kKeys / 16][4];
  uint32_t p[Order::kKeys / 16][2];
  float2 rescale;  // of columns 2 (lane % 4) and the next
};

// A warp: 16 dims of the output. A product of the chain waits some 33 cycles for the one before it: in between, the
// next tile's operands are fetched.
template <class Order>
__device__ void SumValues(const SpreadArgs& spread, const Unit& unit, const KeyRange<Order>& range, int which,
                          ValueShared<Order>& shared) {
  constexpr int kKeys = Order::kKeys;
  constexpr int kGroups = kKeys / 16;
  using Operands = ValueOperands<Order>;
  const AttentionArgs& args = spread.attention;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int quad = lane % 4;
  const int column = min(lane / 4, unit.columns - 1);  // of the second operand; those past the last repeat it, unused
  RingIndex<ValueShared<Order>::kStages> ring;
  const auto await = [&](Operands& operands) {
    BarrierWait(&shared.full[ring.slot], ring.phase);
    const float* record = shared.stages[ring.slot].record;
    operands.rescale = *reinterpret_cast<const float2*>(&record[spread.columns * kKeys + kColumns + 2 * quad]);
  };
  const auto fetch = [&](int g, Operands& operands) {
    const auto& stage = shared.stages[ring.slot];
    const int key = g * 16 + lane / 16 * 8 + lane % 8;
    LoadMatricesTransposed(
        operands.v[g], SharedAddress(stage.v[g * 16 / kBlock]) + BlockOffset(key % kBlock, which * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 weights =
          *reinterpret_cast<const float2*>(&stage.record[column * kKeys + g * 16 + i * 8 + 2 * quad]);
      operands.p[g][i] = PackBf16(weights.x, weights.y);
    }
  };
  const auto fetched = [&] {
    WarpArrive(&shared.empty[ring.slot]);
    ring.Next();
  };
  float o[4] = {};
  // Adds the tile `step`; between its products, between(g).
  const auto add = [&](int step, Operands& operands, auto&& between) {
    const int tile_begin = range.Tile(step) * Order::kKeys;
    if (tile_begin + Order::kKeys - 1 > unit.piece.position) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) KeepWrittenValues(operands.v[g], tile_begin + g * 16, unit.piece.position);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) o[i] = __fmul_rn(o[i], i % 2 == 0 ? operands.rescale.x : operands.rescale.y);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (range.HasBlock(tile_begin / kBlock + g / (kBlock / 16))) {
        Mma16(o, operands.v[g], operands.p[g][0], operands.p[g][1]);
      }
      between(g);
    }
  };
  Operands even, odd;
  const auto add_and_fetch = [&](int step, Operands& operands, Operands& next) {
    add(step, operands, [&](int g) {
      if (g == 0) await(next);
      fetch(g, next);
    });
    fetched();
  };
  await(even);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) fetch(g, even);
  fetched();
  const int last = range.tiles - 1;
  int step = 0;
  for (; step + 1 < last; step += 2) {
    add_and_fetch(step, even, odd);
    add_and_fetch(step + 1, odd, even);
  }
  const auto nothing = [](int) {};
  if (step < last) {
    add_and_fetch(step, even, odd);
    add(last, odd, nothing);
  } else {
    add(last, even, nothing);
  }
  BarrierWait(&shared.summed, 0);
  __nv_bfloat16* out = args.out + unit.piece.row_begin * args.out_stride + unit.first_head * kHeadDim +
                       static_cast<int>(blockIdx.z) * (kHeadDim / Order::kParts) + which * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int to = 2 * quad + i % 2;
    if (to >= unit.columns) continue;
    out[to * kHeadDim + i / 2 * 8] = __float2bfloat16_rn(__fmul_rn(o[i], shared.inverse[to]));
  }
}

// Grid: (kv_heads * groups of 8 query heads, decode_pieces, parts of the head dimension), 4 or 6 warps with three
// duties. Traffic: the piece's values once; the weights once from memory, by the other parts from L2.
template <class Order>
__global__ void __launch_bounds__(Order::kThreads, 1) ValueKernel(const __grid_constant__ SpreadArgs spread) {
  using Shared = ValueShared<Order>;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Shared*>(raw);
  const AttentionArgs& args = spread.attention;
  FollowPreviousKernel();
  const Unit unit(args);
  if (unit.piece.row_count == 0) return;
  const KeyRange<Order> range(unit.piece.position, args.window);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      BarrierInit(&shared.full[i], Order::kBlocks + 1);
      BarrierInit(&shared.empty[i], (Order::kValueWarps + 1) * kWarpArrivals);
    }
    BarrierInit(&shared.summed, kWarpArrivals);
    BarrierInitFence();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp < kSumWarp) {
    LoadValues(spread, unit, range, shared);
  } else if (warp == kSumWarp) {
    Sum(spread, unit, range, shared);
  } else {
    SumValues(spread, unit, range, warp - kFirstValueWarp, shared);
  }
}

int64_t RecordColumns(int64_t heads, int64_t kv_heads) {
  return std::min<int64_t>(heads / kv_heads, kColumns);
}

template <class Order>
absl::Status LaunchValues(const SpreadArgs& spread, dim3 grid, cudaStream_t stream) {
  grid.z = Order::kParts;
  return LaunchKernel("AttentionValues", ValueKernel<Order>, grid, Order::kThreads, sizeof(ValueShared<Order>),
                      LaunchOrder::kOverlapped, stream, spread);
}

template <class Order>
absl::Status Launch(const AttentionParams& params, cudaStream_t stream) {
  const SpreadArgs spread = {
      .attention = MakeAttentionArgs(params),
      .records = static_cast<float*>(params.workspace),
      .tiles_a_unit = static_cast<int32_t>((params.max_positions + Order::kKeys - 1) / Order::kKeys),
      .columns = static_cast<int32_t>(RecordColumns(params.heads, params.kv.kv_heads))};
  const int64_t units = DecodeUnits(params.heads, params.kv.kv_heads);
  const int64_t pieces = params.batch.decode_pieces;
  const int64_t splits = std::clamp<int64_t>(kScoreBlocks / (units * pieces), 1, spread.tiles_a_unit);
  dim3 grid(static_cast<unsigned>(units), static_cast<unsigned>(pieces), static_cast<unsigned>(splits));
  if (absl::Status status = LaunchKernel("AttentionScores", ScoreKernel<Order>, grid, kScoreThreads,
                                         sizeof(ScoreShared), LaunchOrder::kOverlapped, stream, spread);
      !status.ok()) {
    return status;
  }
  grid.z = static_cast<unsigned>((spread.tiles_a_unit + kWeighTiles - 1) / kWeighTiles);
  if (absl::Status status =
          LaunchKernel("AttentionWeights", WeighKernel<Order>, grid, kWeighTiles * 32,
                       sizeof(float[kWeighTiles][kColumns]), LaunchOrder::kOverlapped, stream, spread);
      !status.ok()) {
    return status;
  }
  // As many parts as the card has room for at once.
  return units * pieces <= kSpreadUnits / 2 ? LaunchValues<Parts<Order, 4>>(spread, grid, stream)
                                            : LaunchValues<Parts<Order, 2>>(spread, grid, stream);
}

}  // namespace

bool DecodeIsSpread(int64_t decode_pieces, int64_t heads, int64_t kv_heads) {
  return decode_pieces * DecodeUnits(heads, kv_heads) <= kSpreadUnits;
}

int64_t SpreadWorkspaceBytes(int64_t decode_pieces, int64_t heads, int64_t kv_heads, int64_t max_positions) {
  // Enough for both programs: their tiles differ.
  const int64_t tiles = (max_positions + CudnnOrder::kKeys - 1) / CudnnOrder::kKeys;
  constexpr int64_t kFa2Tiles = CudnnOrder::kKeys / Fa2Order::kKeys;
  return decode_pieces * DecodeUnits(heads, kv_heads) * tiles * kFa2Tiles *
         RecordFloats<Fa2Order>(RecordColumns(heads, kv_heads)) * static_cast<int64_t>(sizeof(float));
}

absl::Status LaunchAttentionDecodeSpread(const AttentionParams& params, cudaStream_t stream) {
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

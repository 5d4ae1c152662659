// Decode for few sequences: one kernel computes all scores, its blocks spread over the key tiles; a second walks the
// tiles in the row's order, a block for a half or a quarter of the head dimension. The scores go through memory once,
// fp32.
#include <cmath>

#include "kernels/cuda/attention_decode.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kHeadDim = kDecodeHeadDim;
constexpr int kBlock = kDecodeBlock;
constexpr int kColumns = kDecodeColumns;
constexpr int64_t kScoreBlocks = 3 * kMultiprocessors;  // at once on the card
// Two blocks each, or four of half as many, are one for a multiprocessor.
constexpr int64_t kSpreadUnits = kMultiprocessors / 2;

struct SpreadArgs {
  AttentionArgs attention;
  float* records;        // [units, tiles_a_unit]: of the unit's tiles in the row's order
  int32_t tiles_a_unit;  // at most
  int32_t columns;       // of a record
};

// A tile's scores [columns, kKeys], -infinity where the row sees no key, and their maxima [8]; whole lines of 128
// bytes, so that a bulk copy of it begins and ends with a line.
template <class Order>
__host__ __device__ constexpr int64_t RecordFloats(int64_t columns) {
  constexpr int64_t kLineFloats = 128 / sizeof(float);
  return (columns * Order::kKeys + kColumns + kLineFloats - 1) / kLineFloats * kLineFloats;
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

constexpr int kWeightWarps = 4;
// Warps: loading records, loading values, summing, weights, values.
constexpr int kLoadRecordsWarp = 0;
constexpr int kLoadValuesWarp = 1;
constexpr int kLoadValuesWarps = 4;
constexpr int kSumWarp = kLoadValuesWarp + kLoadValuesWarps;
constexpr int kFirstWeightWarp = kSumWarp + 1;
constexpr int kFirstValueWarp = kFirstWeightWarp + kWeightWarps;
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
  // As loaded; then the weights, in place of the scores.
  float scores[RecordFloats<Order>(kColumns)];
  uint32_t p[Order::kKeys / 16][32][2];  // the weights as the second operand of each 16 keys
  float rescale[kColumns];
};

// As many stages as there is room for.
template <class Order>
struct ValueShared {
  static constexpr int kStages = static_cast<int>(kRingBytes / sizeof(ValueStage<Order>));

  ValueStage<Order> stages[kStages];
  float inverse[kColumns];
  uint64_t scored[kStages];  // the record is there,
  uint64_t full[kStages];    // the values
  uint64_t weighed[kStages];
  uint64_t empty[kStages];
  uint64_t summed;  // `inverse` is there
};

// A warp: every tile's record, which comes from L2 and is weighed while the values are on their way.
template <class Order>
__device__ void LoadRecords(const SpreadArgs& spread, const KeyRange<Order>& range, ValueShared<Order>& shared) {
  if (threadIdx.x % 32 != 0) return;
  const auto record_bytes = static_cast<uint32_t>(RecordFloats<Order>(spread.columns) * sizeof(float));
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step) {
    uint64_t* scored = &shared.scored[ring.slot];
    BarrierWait(&shared.empty[ring.slot], ring.phase ^ 1);
    BarrierArriveExpectBytes(scored, record_bytes);
    BulkCopy(Record<Order>(spread, step), shared.stages[ring.slot].scores, scored, record_bytes);
    ring.Next();
  }
}

// A warp of kLoadValuesWarps: of every kLoadValuesWarps-th tile its part of each block of values. One lane announces
// the bytes of all, then a lane for each copy. A warp alone takes 0.35 us a tile for that, most of it waiting for its
// own barriers and shuffles, where memory gives a tile in 0.24.
template <class Order>
__device__ void LoadValues(const AttentionArgs& args, const Unit& unit, const KeyRange<Order>& range,
                           ValueShared<Order>& shared) {
  const std::byte* values = args.kv + (args.kv_heads + unit.kv_head) * args.page_size * kKvRowBytes +
                            static_cast<int>(blockIdx.z) * Order::kBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int which = static_cast<int>(threadIdx.x / 32) - kLoadValuesWarp;
  PageCursor<Order> cursor(args, unit.piece, range);
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step, ring.Next()) {
    if (step % kLoadValuesWarps != which) continue;
    const int first_block = range.Tile(step) * Order::kBlocks;
    int row = 0;  // of this lane's block
#pragma unroll
    for (int i = 0; i < Order::kBlocks; ++i) {
      const int at = cursor.Row(first_block + i);
      if (i == lane) row = at;
    }
    uint64_t* full = &shared.full[ring.slot];
    BarrierWait(&shared.empty[ring.slot], ring.phase ^ 1);
    if (lane == 0) {
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < Order::kBlocks; ++i) bytes += range.HasBlock(first_block + i) ? Order::kBytes : 0;
      BarrierArriveExpectBytes(full, bytes);
    }
    __syncwarp();  // no copy may end before its bytes are announced
    if (lane < Order::kBlocks && range.HasBlock(first_block + lane)) {
      BulkCopy(values + row * kKvRowBytes, shared.stages[ring.slot].v[lane], full, Order::kBytes);
    }
  }
}

// A warp of kWeightWarps: the weights of every kWeightWarps-th tile. The maximum runs over all tiles.
template <class Order>
__device__ void Weigh(const SpreadArgs& spread, const Unit& unit, const KeyRange<Order>& range, int which,
                      ValueShared<Order>& shared) {
  constexpr int kKeys = Order::kKeys;
  const ExponentScale& exponent = spread.attention.exponent;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int quad = lane % 4;
  const int column = min(lane / 4, unit.columns - 1);
  const bool own_column = lane / 4 < unit.columns;
  float row_max = -INFINITY;
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step) {
    auto& stage = shared.stages[ring.slot];
    BarrierWait(&shared.scored[ring.slot], ring.phase);
    const TileFactors factors = NextTile<Order>(row_max, stage.scores[spread.columns * kKeys + column], exponent);
    if (step % kWeightWarps == which) {
      float2 weights[kKeys / 8];
      uint32_t p[kKeys / 8];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float2 s = *reinterpret_cast<const float2*>(&stage.scores[column * kKeys + 8 * i + 2 * quad]);
        weights[i].x = Weight<Order>(s.x, factors, exponent);
        weights[i].y = Weight<Order>(s.y, factors, exponent);
        p[i] = PackBf16(weights[i].x, weights[i].y);
      }
      __syncwarp();  // the columns past the last read the last one's scores
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        *reinterpret_cast<uint2*>(stage.p[i][lane]) = make_uint2(p[2 * i], p[2 * i + 1]);
      }
      if (own_column) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
          *reinterpret_cast<float2*>(&stage.scores[column * kKeys + 8 * i + 2 * quad]) = weights[i];
        }
      }
      if (quad == 0) stage.rescale[lane / 4] = factors.rescale;
      ProxyFence();  // the next record is copied over the weights
      WarpArrive(&shared.weighed[ring.slot]);
    }
    WarpArrive(&shared.empty[ring.slot]);
    ring.Next();
  }
}

// A warp: the sums of the weights.
template <class Order>
__device__ void Sum(const Unit& unit, const KeyRange<Order>& range, ValueShared<Order>& shared) {
  constexpr int kKeys = Order::kKeys;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int column = min(lane / 4, unit.columns - 1);
  RowSum<Order> sum;
  RingIndex<ValueShared<Order>::kStages> ring;
  for (int step = 0; step < range.tiles; ++step) {
    const auto& stage = shared.stages[ring.slot];
    BarrierWait(&shared.weighed[ring.slot], ring.phase);
    float2 weights[kKeys / 8];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      weights[i] = *reinterpret_cast<const float2*>(&stage.scores[column * kKeys + 8 * i + 2 * (lane % 4)]);
    }
    sum.BeginTile(stage.rescale[column]);
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
  uint2 p[Order::kKeys / 16];
  float2 rescale;  // of columns 2 (lane % 4) and the next
};

// A warp: 16 dims of the output. A product of the chain waits some 33 cycles for the one before it: in between, the
// next tile's operands are fetched.
template <class Order>
__device__ void SumValues(const AttentionArgs& args, const Unit& unit, const KeyRange<Order>& range, int which,
                          ValueShared<Order>& shared) {
  constexpr int kGroups = Order::kKeys / 16;
  using Operands = ValueOperands<Order>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int quad = lane % 4;
  RingIndex<ValueShared<Order>::kStages> ring;
  const auto await = [&](Operands& operands) {
    BarrierWait(&shared.full[ring.slot], ring.phase);
    BarrierWait(&shared.weighed[ring.slot], ring.phase);
    operands.rescale = *reinterpret_cast<const float2*>(&shared.stages[ring.slot].rescale[2 * quad]);
  };
  const auto fetch = [&](int g, Operands& operands) {
    const auto& stage = shared.stages[ring.slot];
    const int key = g * 16 + lane / 16 * 8 + lane % 8;
    LoadMatricesTransposed(
        operands.v[g], SharedAddress(stage.v[g * 16 / kBlock]) + BlockOffset(key % kBlock, which * 2 + lane / 8 % 2));
    operands.p[g] = *reinterpret_cast<const uint2*>(stage.p[g][lane]);
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
        Mma16(o, operands.v[g], operands.p[g].x, operands.p[g].y);
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
    const int column = 2 * quad + i % 2;
    if (column >= unit.columns) continue;
    out[column * kHeadDim + i / 2 * 8] = __float2bfloat16_rn(__fmul_rn(o[i], shared.inverse[column]));
  }
}

// Grid: (kv_heads * groups of 8 query heads, decode_pieces, parts of the head dimension), 12 or 14 warps with
// five duties. Traffic: the piece's values once; the scores once from memory, by the other parts from L2.
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
      BarrierInit(&shared.scored[i], 1);
      BarrierInit(&shared.full[i], 1);
      BarrierInit(&shared.weighed[i], kWarpArrivals);
      BarrierInit(&shared.empty[i], (kWeightWarps + Order::kValueWarps + 1) * kWarpArrivals);
    }
    BarrierInit(&shared.summed, kWarpArrivals);
    BarrierInitFence();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp == kLoadRecordsWarp) {
    LoadRecords(spread, range, shared);
  } else if (warp < kSumWarp) {
    LoadValues(args, unit, range, shared);
  } else if (warp == kSumWarp) {
    Sum(unit, range, shared);
  } else if (warp < kFirstValueWarp) {
    Weigh(spread, unit, range, warp - kFirstWeightWarp, shared);
  } else {
    SumValues(args, unit, range, warp - kFirstValueWarp, shared);
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

#include <cmath>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_math.cuh"
#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/attention_wgmma.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/warp_arrive.cuh"

namespace lockstep::cuda {
namespace {

constexpr int kHeadDim = 128;
constexpr int kBlock = static_cast<int>(kKvBlock);
constexpr int kGroup = 128;  // threads of a warpgroup
// Of a warpgroup's threads, those that arrive where a stage is free again: one, or for racecheck's eyes all.
constexpr int kGroupArrivals = kWarpArrivals == 1 ? 1 : kGroup;
constexpr int kTiles = 2;  // query tiles of a block, a warpgroup each
constexpr int kThreads = (1 + kTiles) * kGroup;
constexpr int kRows = 64;             // of a query tile
constexpr int kQPlane = kRows * 128;  // 64 rows x 64 dims, in the 128-byte swizzle
constexpr int kPlanes = static_cast<int>(kKvPlanes);
constexpr int kLineBytes = static_cast<int>(kKvLineBytes);
// Of 65,536 / 384 = 168 registers a thread, the loading warpgroup hands most to the others.
constexpr int kLoadRegisters = 24;
constexpr int kMathRegisters = 240;

// Key tiles of k and v in flight; a tile lies in planes of 32 dims, in the 64-byte swizzle.
template <class Order>
struct PrefillShared {
  static constexpr int kStages = 256 / Order::kKeys;
  static constexpr int kPlane = Order::kKeys * kLineBytes;
  static constexpr int kCopies = Order::kKeys / kBlock * kPlanes;  // of a tile of k or v

  alignas(1024) std::byte q[kTiles][2][kQPlane];
  alignas(1024) std::byte k[kStages][kPlanes][kPlane];
  alignas(1024) std::byte v[kStages][kPlanes][kPlane];
  uint64_t k_full[kStages];
  uint64_t v_full[kStages];
  uint64_t k_empty[kStages];
  uint64_t v_empty[kStages];
};

// What a block works on: one or two neighbouring query tiles of a piece, and the keys that they see.
template <class Order>
struct Work {
  int tiles = 0;  // 0: none
  DeviceTile tile[kTiles];
  int page_begin;
  int end;         // keys from here on are seen by no row, and may not be written yet
  int begin;       // a multiple of 64: keys before it are seen by no row
  int first_tile;  // of keys
  int key_tiles;

  __device__ int KeyTile(int step) const {
    return Order::kForward ? first_tile + step : first_tile + key_tiles - 1 - step;
  }
};

// The tile of an odd block of 64 belongs to the thread block of the even one before it, unless its piece starts there.
template <class Order>
__device__ Work<Order> FindWork(const AttentionArgs& args) {
  Work<Order> work;
  const int index = args.batch.tile_count - 1 - static_cast<int>(blockIdx.x);  // long rows first: a short tail
  const DeviceTile tile = args.batch.tiles[index];
  if (tile.row_count == 0) return work;
  const bool odd = tile.position / kBlock % 2 != 0;
  if (odd && index > 0) {
    const DeviceTile before = args.batch.tiles[index - 1];
    if (before.row_count > 0 && before.piece == tile.piece) return work;
  }
  work.tiles = 1;
  work.tile[0] = tile;
  work.tile[1] = tile;
  if (!odd && index + 1 < args.batch.tile_count) {
    const DeviceTile after = args.batch.tiles[index + 1];
    if (after.row_count > 0 && after.piece == tile.piece) {
      work.tiles = 2;
      work.tile[1] = after;
    }
  }
  work.page_begin = args.batch.pieces[tile.piece].page_begin;
  work.end = work.tile[1].position + work.tile[1].row_count;
  const int first_key = args.window > 0 ? max(0, tile.position - args.window + 1) : 0;
  work.begin = first_key / kBlock * kBlock;
  work.first_tile = first_key / Order::kKeys;
  work.key_tiles = (work.end - 1) / Order::kKeys - work.first_tile + 1;
  return work;
}

template <int kStages>
struct StageIndex {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
};

// A warp. A lane for each plane of a tile's blocks: one thread issues 8 copies in a microsecond, a warp 32.
template <class Order>
__device__ void Load(const AttentionArgs& args, const Work<Order>& work, int kv_head, PrefillShared<Order>& shared) {
  using Shared = PrefillShared<Order>;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= Shared::kCopies) return;
  const int half = lane / kPlanes;
  const int plane = lane % kPlanes;
  const int32_t* pages = args.batch.pages + work.page_begin;
  StageIndex<Shared::kStages> at;
  for (int step = 0; step < work.key_tiles; ++step) {
    const int key = work.KeyTile(step) * Order::kKeys + half * kBlock;
    const bool seen = key >= work.begin && key < work.end;
    int row = 0;  // of 256 bytes, of the pages: the keys'
    if (seen) row = pages[key / args.page_size] * args.page_rows + kv_head * args.page_size + key % args.page_size;
    const std::byte* from = args.kv + row * kKvRowBytes + plane * kKvPlaneBytes;
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      auto& to = operand == 0 ? shared.k[at.stage] : shared.v[at.stage];
      uint64_t* full = operand == 0 ? &shared.k_full[at.stage] : &shared.v_full[at.stage];
      BarrierWait(operand == 0 ? &shared.k_empty[at.stage] : &shared.v_empty[at.stage], at.phase ^ 1);
      BarrierArriveExpectBytes(full, seen ? kKvPlaneBytes : 0);
      if (seen) BulkCopy(from, to[plane] + half * kKvPlaneBytes, full, kKvPlaneBytes);
      from += args.kv_heads * args.page_size * kKvRowBytes;
    }
    at.Next();
  }
}

// Zeroes the values of keys outside [begin, end) of a tile: 0 times what lies there must be 0. Both warpgroups do it to
// the same stage, each for itself.
template <class Order>
__device__ void ZeroUnseenValues(std::byte (&v)[kPlanes][PrefillShared<Order>::kPlane], int tile_begin, int begin,
                                 int end, int thread) {
  constexpr int kPlaneChunks = PrefillShared<Order>::kPlane / 16;
  for (int i = thread; i < kPlanes * kPlaneChunks; i += kGroup) {
    const int key = tile_begin + i % kPlaneChunks / (kLineBytes / 16);
    if (key >= begin && key < end) continue;
    reinterpret_cast<uint4*>(v[0])[i] = make_uint4(0, 0, 0, 0);  // the planes follow each other
  }
  ProxyFence();
}

template <class Order>
struct Registers {
  static constexpr int kScores = Order::kKeys / 2;  // a thread's share of 64 rows
  float s[kScores];
  float o[kHeadDim / 2];
  uint32_t p[kScores / 2];
};

template <class Order>
__device__ void IssueScores(Registers<Order>& r, uint64_t q, uint64_t k) {
  KeepRegisters(r.s);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    WgmmaScores(r.s, Advanced(q, step / 4 * kQPlane + step % 4 * 32),
                Advanced(k, step / 2 * PrefillShared<Order>::kPlane + step % 2 * 32), step > 0);
  }
  WgmmaCommit();
  KeepRegisters(r.s);
}

template <class Order>
__device__ void IssueValues(Registers<Order>& r, uint64_t v) {
  KeepRegisters(r.o);
  WgmmaFence();
#pragma unroll
  for (int step = 0; step < Order::kKeys / 16; ++step) {
    WgmmaValues(r.o, &r.p[4 * step], Advanced(v, step * 16 * kLineBytes));
  }
  WgmmaCommit();
  KeepRegisters(r.o);
}

// Hides what a row does not see. `row_position`: of the thread's first row; the second is 8 further on.
template <class Order>
__device__ void Mask(float (&s)[Registers<Order>::kScores], int tile_begin, int row_position, int window, int quad) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    // Of the thread's first column; the others are constants further on.
    const int last = row_position + 8 * row - tile_begin - 2 * quad;
    const int hidden = window > 0 ? last - window : -1;
#pragma unroll
    for (int i = 0; i < Registers<Order>::kScores; ++i) {
      const int column = i / 4 * 8 + i % 2;
      if (i % 4 / 2 == row && (column > last || column <= hidden)) s[i] = -INFINITY;
    }
  }
}

template <class Order>
struct Row {
  float max = -INFINITY;
  RowSum<Order> sum;
};

// Scores to weights in place; the factors by which the rows' output changes first.
template <class Order>
__device__ void Softmax(float (&s)[Registers<Order>::kScores], Row<Order> (&rows)[2], float (&rescale)[2],
                        const ExponentScale& exponent) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float tile_max = s[2 * row];
#pragma unroll
    for (int i = 0; i < Registers<Order>::kScores; i += 4) {
      tile_max = fmaxf(tile_max, fmaxf(s[i + 2 * row], s[i + 2 * row + 1]));
    }
    const TileFactors factors = NextTile<Order>(rows[row].max, QuadMax(tile_max), exponent);
    rescale[row] = factors.rescale;
    rows[row].sum.BeginTile(factors.rescale);
#pragma unroll
    for (int i = 0; i < Registers<Order>::kScores; ++i) {
      if (i % 4 / 2 != row) continue;
      s[i] = Weight<Order>(s[i], factors, exponent);
      rows[row].sum.Add(s[i]);
    }
    rows[row].sum.EndTile();
  }
}

// A step's accumulator is the next product's operand: columns 8 i of a row are one register pair of both.
template <class Order>
__device__ void PackWeights(Registers<Order>& r) {
#pragma unroll
  for (int i = 0; i < Registers<Order>::kScores / 2; ++i) r.p[i] = PackBf16(r.s[2 * i], r.s[2 * i + 1]);
}

// Grid: (tiles, heads), a warpgroup that loads and two of mathematics, each with the 64 rows of a query tile.
// The scores of the next key tile are computed beside the product with the last one's values.
// Traffic: per block and key tile of 128, 64 KB of keys and values, from L2 for all but the first block of a head.
template <class Order>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ AttentionArgs args) {
  using Shared = PrefillShared<Order>;
  constexpr int kKeys = Order::kKeys;
  extern __shared__ __align__(1024) std::byte raw[];
  auto& shared = *reinterpret_cast<Shared*>(raw);
  const Work<Order> work = FindWork<Order>(args);
  if (work.tiles == 0) return;
  const int head = static_cast<int>(blockIdx.y);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      BarrierInit(&shared.k_full[i], Shared::kCopies);
      BarrierInit(&shared.v_full[i], Shared::kCopies);
      BarrierInit(&shared.k_empty[i], work.tiles * kGroupArrivals);
      BarrierInit(&shared.v_empty[i], work.tiles * kGroupArrivals);
    }
    BarrierInitFence();
  }
  __syncthreads();

  if (threadIdx.x < kGroup) {
    ReleaseRegisters<kLoadRegisters>();
    if (threadIdx.x < 32) Load(args, work, head / args.group, shared);
    return;
  }
  ClaimRegisters<kMathRegisters>();
  const int which = static_cast<int>(threadIdx.x) / kGroup - 1;
  if (which >= work.tiles) return;
  const DeviceTile tile = which == 0 ? work.tile[0] : work.tile[1];
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int quad = thread % 4;
  const int row = thread / 32 * 16 + thread % 32 / 4;  // and 8 further on

  for (int i = thread; i < kRows * kHeadDim / 8; i += kGroup) {
    const int r = i / (kHeadDim / 8);
    const int chunk = i % (kHeadDim / 8);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (r < tile.row_count) {
      value =
          *reinterpret_cast<const uint4*>(args.q + (tile.row_begin + r) * args.q_stride + head * kHeadDim + chunk * 8);
    }
    *reinterpret_cast<uint4*>(shared.q[which][chunk / 8] + Swizzled128(r, chunk % 8)) = value;
  }
  ProxyFence();
  NamedBarrier(1 + which, kGroup);

  const uint64_t q = WgmmaDescriptor<WgmmaSwizzle::k128Bytes>(shared.q[which], 0);
  Registers<Order> r;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) r.o[i] = 0.0f;
  Row<Order> rows[2];
  StageIndex<Shared::kStages> k_at;
  StageIndex<Shared::kStages> v_at;

  const auto issue_scores = [&] {
    BarrierWait(&shared.k_full[k_at.stage], k_at.phase);
    IssueScores<Order>(r, q, WgmmaDescriptor<WgmmaSwizzle::k64Bytes>(shared.k[k_at.stage], 0));
  };
  const auto release_k = [&] {
    if (thread < kGroupArrivals) BarrierArrive(&shared.k_empty[k_at.stage]);
    k_at.Next();
  };
  // Only a row's first and last tiles have keys that no row sees.
  const auto zero_unseen_values = [&](int step) {
    const int tile_begin = work.KeyTile(step) * kKeys;
    if (tile_begin >= work.begin && tile_begin + kKeys <= work.end) return;
    BarrierWait(&shared.v_full[v_at.stage], v_at.phase);
    ZeroUnseenValues<Order>(shared.v[v_at.stage], tile_begin, work.begin, work.end, thread);
    NamedBarrier(1 + which, kGroup);
  };
  const auto issue_values = [&] {
    BarrierWait(&shared.v_full[v_at.stage], v_at.phase);
    IssueValues<Order>(r, WgmmaDescriptor<WgmmaSwizzle::k64Bytes>(shared.v[v_at.stage], Shared::kPlane));
  };
  const auto release_v = [&] {
    if (thread < kGroupArrivals) BarrierArrive(&shared.v_empty[v_at.stage]);
    v_at.Next();
  };
  const auto softmax = [&](int step, float(&rescale)[2]) {
    const int tile_begin = work.KeyTile(step) * kKeys;
    const bool masked = tile_begin + kKeys - 1 > tile.position ||
                        (args.window > 0 && tile_begin <= tile.position + kRows - 1 - args.window);
    if (masked) Mask<Order>(r.s, tile_begin, tile.position + row, args.window, quad);
    Softmax<Order>(r.s, rows, rescale, args.exponent);
  };

  const auto rescale_output = [&](const float(&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) r.o[i] = __fmul_rn(r.o[i], rescale[i % 4 / 2]);
  };

  float rescale[2];
  issue_scores();
  WgmmaWait<0>();
  KeepRegisters(r.s);
  release_k();
  softmax(0, rescale);
  PackWeights(r);
  zero_unseen_values(0);
  for (int step = 1; step < work.key_tiles; ++step) {
    issue_scores();
    rescale_output(rescale);  // of the last tile, beside the scores of this one
    issue_values();
    WgmmaWait<1>();
    KeepRegisters(r.s);
    release_k();
    softmax(step, rescale);
    KeepRegisters(r.s);
    WgmmaWait<0>();
    KeepRegisters(r.o);
    release_v();
    PackWeights(r);
  }
  rescale_output(rescale);
  zero_unseen_values(work.key_tiles - 1);
  issue_values();
  WgmmaWait<0>();
  KeepRegisters(r.o);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = rows[half].sum.Inverse();
    if (row + 8 * half >= tile.row_count) continue;
    __nv_bfloat16* out = args.out + (tile.row_begin + row + 8 * half) * args.out_stride + head * kHeadDim + 2 * quad;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      *reinterpret_cast<uint32_t*>(out + 8 * i) =
          PackBf16(__fmul_rn(r.o[4 * i + 2 * half], inverse), __fmul_rn(r.o[4 * i + 2 * half + 1], inverse));
    }
  }
}

template <class Order>
absl::Status Launch(const AttentionParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.batch.tile_count), static_cast<unsigned>(params.heads));
  return LaunchKernel("AttentionPrefill", PrefillKernel<Order>, grid, kThreads, sizeof(PrefillShared<Order>),
                      LaunchOrder::kAfter, stream, MakeAttentionArgs(params));
}

}  // namespace

absl::Status LaunchAttentionPrefill(const AttentionParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.batch.tile_count == 0) return absl::OkStatus();
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

// Device code of the linear layer, for the files that compile its tiles.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/swiglu.cuh"
#include "kernels/cuda/tma.h"
#include "kernels/cuda/wgmma.cuh"

namespace lockstep::cuda {

struct LinearKernelArgs {
  CUtensorMap x;       // boxes of the tile's tokens, or m if that is less
  CUtensorMap weight;  // boxes of the tile's features, or n; of LinearFusion::kSwiGlu a pair: gate's rows and up's
  int x_boxes = 0;     // of one copy: the stage's, or one at a time
  int weight_boxes = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  int m = 0;
  int n = 0;  // of out
  int k = 0;
  bool fp32 = false;
  int x_rows = 0;  // of a box in the ring
  int stages = 0;
  int token_tiles = 0;
  int feature_tiles = 0;
  int group_tokens = 0;
};

using LinearKernel = void (*)(LinearKernelArgs);

// Of the widths that the plan lists; null for another one.
LinearKernel FindLinearKernel1x1(int features);
LinearKernel FindLinearKernel2x1(int features);
LinearKernel FindLinearKernel2x2(int features);
LinearKernel FindLinearSwiGluKernel(const LinearTile& tile);

// Two warps that copy beside the warpgroup that multiplies; beside two, a whole warpgroup, since registers change hands
// by warpgroups.
constexpr int LinearThreads(int warpgroups) {
  return warpgroups == 1 ? 192 : (warpgroups + 1) * 128;
}

#if defined(__CUDACC__)

constexpr int kRowBytes = kTensorMapBoxCols * static_cast<int>(sizeof(__nv_bfloat16));
constexpr int kGroup = 16;                              // elements of k in one product
constexpr int kBoxGroups = kTensorMapBoxCols / kGroup;  // products in a box
constexpr int kGroupBytes = kGroup * static_cast<int>(sizeof(__nv_bfloat16));

// What a tile's kernel knows when it is compiled.
template <int kWarpgroupCount, int kBlockCount, int kFeatureCount, LinearFusion kFusion>
struct LinearTraits {
  static constexpr bool kSwiGlu = kFusion == LinearFusion::kSwiGlu;
  static constexpr int kWarpgroups = kWarpgroupCount;
  static constexpr int kBlocks = kBlockCount;
  static constexpr int kFeatures = kFeatureCount;
  static constexpr int kOutputs =
      LinearTile{.warpgroups = kWarpgroups, .blocks = kBlocks, .features = kFeatures}.outputs(kFusion);
  static constexpr int kTokens = kWarpgroups * kBlocks * 64;
  static constexpr int kStageBoxes = LinearStageBoxes(kTokens, kFeatures);
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
  static_assert(kOutputs % 8 == 0, "rows of the weight come in groups of the swizzle's 8");
};

// The ring: stages of x's boxes and the weight's after them. Addresses are of shared memory.
struct LinearRing {
  uint32_t stages, full, empty;  // the first of each

  __device__ uint32_t Full(int stage) const { return full + 8 * stage; }
  __device__ uint32_t Empty(int stage) const { return empty + 8 * stage; }
};

// Where a tile's operands begin, and from where on its outputs are stored. The last tile of a row or column is moved
// back until it ends with the matrix, because copies of what lies outside are slow: it computes some of its neighbour's
// outputs again.
struct LinearOrigin {
  int row, col;
  int first_row, first_col;
};

// Tokens run fastest, so that the tiles under way share weights; groups keep their rows of x within L2.
template <class Traits>
__device__ LinearOrigin TileOrigin(const LinearKernelArgs& args, int index) {
  int first_row = 0;
  int first_col = index * Traits::kOutputs;
  if (args.token_tiles > 1) {
    const int group_tiles = args.group_tokens * args.feature_tiles;
    const int group = index / group_tiles;
    const int rest = index % group_tiles;
    const int width = min(args.group_tokens, args.token_tiles - group * args.group_tokens);
    first_row = (group * args.group_tokens + rest % width) * Traits::kTokens;
    first_col = rest / width * Traits::kOutputs;
  }
  return {max(0, min(first_row, args.m - Traits::kTokens)), max(0, min(first_col, args.n - Traits::kOutputs)),
          first_row, first_col};
}

enum class LinearOperand { kX, kWeight };

// One thread for each operand, so that the instructions around a copy do not add up.
// kSwiGlu: a stage's box of the weight is gate's rows from the tile's first column on and, behind them, up's, which one
// copy brings. Up's place is fixed, so of matrices with fewer rows than a tile takes the zeros behind them come too.
template <class Traits, LinearOperand kOperand>
__device__ void CopyTiles(const LinearKernelArgs& args, const LinearRing& ring) {
  constexpr bool kWeight = kOperand == LinearOperand::kWeight;
  constexpr bool kPair = kWeight && Traits::kSwiGlu;
  constexpr int kFeatures = Traits::kFeatures;
  constexpr int kBoxes = Traits::kStageBoxes;
  const uint32_t x_bytes = args.x_rows * kRowBytes;
  const uint32_t stage_bytes = (x_bytes + kFeatures * kRowBytes) * kBoxes;
  const uint32_t begin = ring.stages + (kWeight ? x_bytes * kBoxes : 0);
  const uint32_t box_bytes = kWeight ? kFeatures * kRowBytes : x_bytes;
  const int copied_rows = kPair ? kFeatures : kWeight ? min(kFeatures, args.n) : min(Traits::kTokens, args.m);
  const uint32_t copied_bytes = copied_rows * kRowBytes * kBoxes;
  const CUtensorMap* map = kWeight ? &args.weight : &args.x;
  const bool together = kWeight ? args.weight_boxes == kBoxes : args.x_boxes == kBoxes;
  const bool whole_boxes = args.k % kTensorMapBoxCols == 0;
  // Weights that no other token tile reads pass through L2 but once.
  const CachePolicy policy = kWeight && args.token_tiles == 1 ? CachePolicy::kEvictFirst : CachePolicy::kEvictNormal;
  const auto copy = [&](uint32_t to, int row, int k, uint32_t barrier) {
    const int box = whole_boxes ? k / kTensorMapBoxCols : 0;
    const int col = whole_boxes ? 0 : k;
    if constexpr (kPair) {
      CopyPairedBoxes(to, map, box, row, col, barrier, policy);
    } else {
      CopyBoxes(to, map, box, row, col, barrier, policy);
    }
  };

  int stage = 0;
  uint32_t parity = 1;  // of the emptying that must have passed: none in the first round
#pragma unroll 1
  for (int index = blockIdx.x; index < args.token_tiles * args.feature_tiles; index += gridDim.x) {
    const LinearOrigin origin = TileOrigin<Traits>(args, index);
    const int row = kWeight ? origin.col : origin.row;
#pragma unroll 1
    for (int k = 0; k < args.k; k += kBoxes * kTensorMapBoxCols) {
      const uint32_t to = begin + stage * stage_bytes;
      WaitBarrier(ring.Empty(stage), parity);
      ArriveExpectBytes(ring.Full(stage), copied_bytes);
      if (together) {
        copy(to, row, k, ring.Full(stage));
      } else {
#pragma unroll 1
        for (int box = 0; box < kBoxes; ++box) {
          copy(to + box * box_bytes, row, k + box * kTensorMapBoxCols, ring.Full(stage));
        }
      }
      if (++stage == args.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// What of a tile is stored: rows and columns [first, end).
struct LinearWindow {
  int first_row, end_row, first_col, end_col;

  __device__ bool Row(int row) const { return row >= first_row && row < end_row; }
  __device__ bool Col(int col) const { return col >= first_col && col < end_col; }
};

// Two neighbouring outputs of this thread in bf16: of column group `group`, in row g (half 0) or g + 8 (wgmma.cuh).
template <class Traits>
__device__ uint32_t OutputPair(const float (&d)[Traits::kFeatures / 2], int group, int half) {
  const auto pair = [&](int of) { return PackBf16(d[4 * of + 2 * half], d[4 * of + 2 * half + 1]); };
  if constexpr (Traits::kSwiGlu) {
    return SwiGlu<2>({pair(group)}, {pair(group + Traits::kOutputs / 8)}).words[0];
  } else {
    return pair(group);
  }
}

// Rows `row` (half 0) and `row` + 8 of this thread, or one of them. Neighbouring threads exchange halves of two column
// groups, so that each stores 8 bytes and four of them a whole sector.
template <class Traits, int kFirstHalf, int kEndHalf>
__device__ void StoreBf16(const LinearKernelArgs& args, const LinearWindow& window,
                          const float (&d)[Traits::kFeatures / 2], int row, int col) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane % 2 != 0;
  __nv_bfloat16* out[] = {static_cast<__nv_bfloat16*>(args.out) + row * args.out_stride + col, nullptr};
  out[1] = out[0] + 8 * args.out_stride;
  constexpr int kPairs = Traits::kOutputs / 16;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint2 words[2];
#pragma unroll
    for (int half = kFirstHalf; half < kEndHalf; ++half) {
      const uint32_t first = OutputPair<Traits>(d, 2 * p, half), second = OutputPair<Traits>(d, 2 * p + 1, half);
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
      words[half] = odd ? make_uint2(other, second) : make_uint2(first, other);
    }
    const int offset = 16 * p + (odd ? 8 : 0) + 4 * (lane / 2);
    if (!window.Col(col + offset)) continue;
#pragma unroll
    for (int half = kFirstHalf; half < kEndHalf; ++half) {
      if (window.Row(row + 8 * half)) *reinterpret_cast<uint2*>(out[half] + offset) = words[half];
    }
  }
  if constexpr (Traits::kOutputs % 16 != 0) {
    const int offset = 16 * kPairs + 2 * lane;
    if (!window.Col(col + offset)) return;
#pragma unroll
    for (int half = kFirstHalf; half < kEndHalf; ++half) {
      const uint32_t word = OutputPair<Traits>(d, 2 * kPairs, half);
      if (window.Row(row + 8 * half)) *reinterpret_cast<uint32_t*>(out[half] + offset) = word;
    }
  }
}

template <int kFeatures>
__device__ void StoreFp32(const LinearKernelArgs& args, const LinearWindow& window, const float (&d)[kFeatures / 2],
                          int row, int col) {
  float* low = static_cast<float*>(args.out) + row * args.out_stride + col;
  float* high = low + 8 * args.out_stride;
#pragma unroll
  for (int j = 0; j < kFeatures / 8; ++j) {
    const int offset = 8 * j + 2 * (threadIdx.x % 4);
    if (!window.Col(col + offset)) continue;
    if (window.Row(row)) *reinterpret_cast<float2*>(low + offset) = make_float2(d[4 * j], d[4 * j + 1]);
    if (window.Row(row + 8)) *reinterpret_cast<float2*>(high + offset) = make_float2(d[4 * j + 2], d[4 * j + 3]);
  }
}

// Every accumulator takes the groups of 16 in ascending order, from zero: the contract.
template <class Traits>
__device__ void ConsumeTiles(const LinearKernelArgs& args, const LinearRing& ring) {
  constexpr int kBlocks = Traits::kBlocks;
  constexpr int kFeatures = Traits::kFeatures;
  constexpr int kBoxes = Traits::kStageBoxes;
  const uint32_t x_bytes = args.x_rows * kRowBytes;
  const uint32_t stage_bytes = (x_bytes + kFeatures * kRowBytes) * kBoxes;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // so that the compiler knows it is uniform
  const int warpgroup_row = warp / 4 * kBlocks * 64;
  const int lane = threadIdx.x % 32;
  float d[kBlocks][kFeatures / 2];

  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < args.token_tiles * args.feature_tiles; index += gridDim.x) {
    int accumulate = 0;
    int previous = -1;
    for (int k = 0; k < args.k; k += kBoxes * kTensorMapBoxCols) {
      WaitBarrier(ring.Full(stage), parity);
      WgmmaFence();
      // Past the end of k both operands are zeros: groups that change no accumulator.
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const uint32_t x_box = ring.stages + stage * stage_bytes + box * x_bytes;
        const uint32_t weight_box = ring.stages + stage * stage_bytes + kBoxes * x_bytes + box * kFeatures * kRowBytes;
        const uint64_t x = SwizzledOperand(x_box + warpgroup_row * kRowBytes);
        const uint64_t weight = SwizzledOperand(weight_box);
#pragma unroll
        for (int g = 0; g < kBoxGroups; ++g) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            Wgmma<kFeatures>::Run(d[b], x + (b * 64 * kRowBytes + g * kGroupBytes) / 16, weight + g * kGroupBytes / 16,
                                  accumulate);
          }
          accumulate = 1;
        }
      }
      WgmmaCommit();
      WgmmaWait<1>();
      if (previous >= 0 && lane == 0) Arrive(ring.Empty(previous));
      previous = stage;
      if (++stage == args.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    WgmmaWait<0>();
    if (lane == 0) Arrive(ring.Empty(previous));
    const LinearOrigin origin = TileOrigin<Traits>(args, index);
    const LinearWindow window = {origin.first_row, args.m, origin.first_col, args.n};
    const int warp_row = origin.row + warpgroup_row + warp % 4 * 16;
    const int row = warp_row + lane / 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      PinRegisters(d[b]);
      if constexpr (Traits::kSwiGlu) {  // so dear that 8 rows of a warp of which none is stored are left out
        if (warp_row + b * 64 < args.m) StoreBf16<Traits, 0, 1>(args, window, d[b], row + b * 64, origin.col);
        if (warp_row + b * 64 + 8 < args.m) StoreBf16<Traits, 1, 2>(args, window, d[b], row + b * 64, origin.col);
      } else if (args.fp32) {
        StoreFp32<kFeatures>(args, window, d[b], row + b * 64, origin.col);
      } else {
        StoreBf16<Traits, 0, 2>(args, window, d[b], row + b * 64, origin.col);
      }
    }
  }
}

// What both kernels do.
// Grid: at most a block for every multiprocessor; each takes tiles in turn. A block is kWarpgroups warpgroups that
// multiply, of kBlocks x 64 tokens each, and two threads that copy. The products read 64 rows of x for every 64 tokens,
// of which x_rows were copied: the others are whatever the ring holds, and so are the accumulators of their rows, which
// are not stored.
// Traffic: the weight once from memory (again for every group_tokens token tiles), x once; from L2 into shared memory
// x_rows + kFeatures rows of k for each tile.
template <class Traits>
__device__ __forceinline__ void RunTiles(const LinearKernelArgs& args) {
  __shared__ uint64_t barriers[2 * kLinearMaxStages];
  extern __shared__ uint8_t memory[];
  const LinearRing ring = {.stages = (SharedAddress(memory) + 1023) / 1024 * 1024,
                           .full = SharedAddress(barriers),
                           .empty = SharedAddress(barriers + kLinearMaxStages)};
  ReleaseNextKernel();
  if (threadIdx.x < args.stages) {
    InitBarrier(ring.Full(threadIdx.x), 2);
    InitBarrier(ring.Empty(threadIdx.x), Traits::kConsumers / 32);
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= Traits::kConsumers) {
    if constexpr (Traits::kWarpgroups > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int thread = threadIdx.x - Traits::kConsumers;
    if (thread == 0) {  // reads what no earlier kernel writes, so it does not wait for one
      CopyTiles<Traits, LinearOperand::kWeight>(args, ring);
    } else if (thread == 32) {
      AwaitPreviousKernel();
      CopyTiles<Traits, LinearOperand::kX>(args, ring);
    }
  } else {
    if constexpr (Traits::kWarpgroups > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    ConsumeTiles<Traits>(args, ring);
  }
}

template <int kWarpgroups, int kBlocks, int kFeatures>
__global__ void __launch_bounds__(LinearThreads(kWarpgroups), 1)
    LinearTileKernel(const __grid_constant__ LinearKernelArgs args) {
  RunTiles<LinearTraits<kWarpgroups, kBlocks, kFeatures, LinearFusion::kNone>>(args);
}

// A kernel of its own, so that profiles tell it apart.
template <int kWarpgroups, int kBlocks, int kFeatures>
__global__ void __launch_bounds__(LinearThreads(kWarpgroups), 1)
    LinearSwiGluTileKernel(const __grid_constant__ LinearKernelArgs args) {
  RunTiles<LinearTraits<kWarpgroups, kBlocks, kFeatures, LinearFusion::kSwiGlu>>(args);
}

// The kernel among `kFeatures`... that a tile names.
template <int kWarpgroups, int kBlocks, LinearFusion kFusion = LinearFusion::kNone, int... kFeatures>
LinearKernel FindWidth(std::integer_sequence<int, kFeatures...>, int features) {
  LinearKernel found = nullptr;
  if constexpr (kFusion == LinearFusion::kSwiGlu) {
    ((features == kFeatures ? found = LinearSwiGluTileKernel<kWarpgroups, kBlocks, kFeatures> : found), ...);
  } else {
    ((features == kFeatures ? found = LinearTileKernel<kWarpgroups, kBlocks, kFeatures> : found), ...);
  }
  return found;
}

#endif  // __CUDACC__

}  // namespace lockstep::cuda

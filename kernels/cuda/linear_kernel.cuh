// Device code of the linear layer, for the files that compile its tiles.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/linear_plan.h"
#include "kernels/cuda/tma.h"
#include "kernels/cuda/wgmma.cuh"

namespace lockstep::cuda {

struct LinearKernelArgs {
  CUtensorMap x;       // boxes of the tile's tokens, or m if that is less
  CUtensorMap weight;  // boxes of the tile's features, or n
  int x_boxes = 0;     // of one copy: the stage's, or one at a time
  int weight_boxes = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  int m = 0;
  int n = 0;
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
template <int kWarpgroups, int kBlocks, int kFeatures>
struct LinearTraits {
  static constexpr int kTokens = kWarpgroups * kBlocks * 64;
  static constexpr int kStageBoxes = LinearStageBoxes(kTokens, kFeatures);
  static constexpr int kThreads = LinearThreads(kWarpgroups);
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
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
template <class Traits, int kFeatures>
__device__ LinearOrigin TileOrigin(const LinearKernelArgs& args, int index) {
  int first_row = 0;
  int first_col = index * kFeatures;
  if (args.token_tiles > 1) {
    const int group_tiles = args.group_tokens * args.feature_tiles;
    const int group = index / group_tiles;
    const int rest = index % group_tiles;
    const int width = min(args.group_tokens, args.token_tiles - group * args.group_tokens);
    first_row = (group * args.group_tokens + rest % width) * Traits::kTokens;
    first_col = rest / width * kFeatures;
  }
  return {max(0, min(first_row, args.m - Traits::kTokens)), max(0, min(first_col, args.n - kFeatures)), first_row,
          first_col};
}

enum class LinearOperand { kX, kWeight };

// One thread for each operand, so that the instructions around a copy do not add up.
template <class Traits, int kFeatures, LinearOperand kOperand>
__device__ void CopyTiles(const LinearKernelArgs& args, const LinearRing& ring) {
  constexpr bool kWeight = kOperand == LinearOperand::kWeight;
  constexpr int kBoxes = Traits::kStageBoxes;
  const uint32_t x_bytes = args.x_rows * kRowBytes;
  const uint32_t stage_bytes = (x_bytes + kFeatures * kRowBytes) * kBoxes;
  const uint32_t begin = ring.stages + (kWeight ? x_bytes * kBoxes : 0);
  const uint32_t box_bytes = kWeight ? kFeatures * kRowBytes : x_bytes;
  const uint32_t copied_bytes = (kWeight ? min(kFeatures, args.n) : min(Traits::kTokens, args.m)) * kRowBytes * kBoxes;
  const CUtensorMap* map = kWeight ? &args.weight : &args.x;
  const bool together = kWeight ? args.weight_boxes == kBoxes : args.x_boxes == kBoxes;
  const bool whole_boxes = args.k % kTensorMapBoxCols == 0;
  // Weights that no other token tile reads pass through L2 but once.
  const CachePolicy policy = kWeight && args.token_tiles == 1 ? CachePolicy::kEvictFirst : CachePolicy::kEvictNormal;

  int stage = 0;
  uint32_t parity = 1;  // of the emptying that must have passed: none in the first round
#pragma unroll 1
  for (int index = blockIdx.x; index < args.token_tiles * args.feature_tiles; index += gridDim.x) {
    const LinearOrigin origin = TileOrigin<Traits, kFeatures>(args, index);
    const int row = kWeight ? origin.col : origin.row;
#pragma unroll 1
    for (int k = 0; k < args.k; k += kBoxes * kTensorMapBoxCols) {
      const uint32_t to = begin + stage * stage_bytes;
      WaitBarrier(ring.Empty(stage), parity);
      ArriveExpectBytes(ring.Full(stage), copied_bytes);
      if (together) {
        CopyBoxes(to, map, whole_boxes ? k / kTensorMapBoxCols : 0, row, whole_boxes ? 0 : k, ring.Full(stage), policy);
      } else {
#pragma unroll 1
        for (int box = 0; box < kBoxes; ++box) {
          const int col = k + box * kTensorMapBoxCols;
          CopyBoxes(to + box * box_bytes, map, whole_boxes ? col / kTensorMapBoxCols : 0, row, whole_boxes ? 0 : col,
                    ring.Full(stage), policy);
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

// Rows `row` and `row` + 8 of this thread. Neighbouring threads exchange halves of two column groups, so that each
// stores 8 bytes and four of them a whole sector.
template <int kFeatures>
__device__ void StoreBf16(const LinearKernelArgs& args, const LinearWindow& window, const float (&d)[kFeatures / 2],
                          int row, int col) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane % 2 != 0;
  __nv_bfloat16* low = static_cast<__nv_bfloat16*>(args.out) + row * args.out_stride + col;
  __nv_bfloat16* high = low + 8 * args.out_stride;
  constexpr int kPairs = kFeatures / 16;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const float* v = d + 8 * p;
    const uint32_t low0 = PackBf16(v[0], v[1]), high0 = PackBf16(v[2], v[3]);
    const uint32_t low1 = PackBf16(v[4], v[5]), high1 = PackBf16(v[6], v[7]);
    const uint32_t low_other = __shfl_xor_sync(0xFFFFFFFFu, odd ? low0 : low1, 1);
    const uint32_t high_other = __shfl_xor_sync(0xFFFFFFFFu, odd ? high0 : high1, 1);
    const int offset = 16 * p + (odd ? 8 : 0) + 4 * (lane / 2);
    if (!window.Col(col + offset)) continue;
    const uint2 low_pair = odd ? make_uint2(low_other, low1) : make_uint2(low0, low_other);
    const uint2 high_pair = odd ? make_uint2(high_other, high1) : make_uint2(high0, high_other);
    if (window.Row(row)) *reinterpret_cast<uint2*>(low + offset) = low_pair;
    if (window.Row(row + 8)) *reinterpret_cast<uint2*>(high + offset) = high_pair;
  }
  if constexpr (kFeatures % 16 != 0) {
    constexpr int kLast = kPairs * 8;
    const int offset = 16 * kPairs + 2 * lane;
    if (!window.Col(col + offset)) return;
    if (window.Row(row)) *reinterpret_cast<uint32_t*>(low + offset) = PackBf16(d[kLast], d[kLast + 1]);
    if (window.Row(row + 8)) *reinterpret_cast<uint32_t*>(high + offset) = PackBf16(d[kLast + 2], d[kLast + 3]);
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
template <class Traits, int kBlocks, int kFeatures>
__device__ void ConsumeTiles(const LinearKernelArgs& args, const LinearRing& ring) {
  constexpr int kBoxes = Traits::kStageBoxes;
  const uint32_t x_bytes = args.x_rows * kRowBytes;
  const uint32_t stage_bytes = (x_bytes + kFeatures * kRowBytes) * kBoxes;
  const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);  // so that the compiler knows it is uniform
  const int warpgroup_row = warpgroup * kBlocks * 64;
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
    const LinearOrigin origin = TileOrigin<Traits, kFeatures>(args, index);
    const LinearWindow window = {origin.first_row, args.m, origin.first_col, args.n};
    const int row = origin.row + warpgroup_row + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      PinRegisters(d[b]);
      if (args.fp32) {
        StoreFp32<kFeatures>(args, window, d[b], row + b * 64, origin.col);
      } else {
        StoreBf16<kFeatures>(args, window, d[b], row + b * 64, origin.col);
      }
    }
  }
}

// Grid: at most a block for every multiprocessor; each takes tiles in turn. A block is kWarpgroups warpgroups that
// multiply, of kBlocks x 64 tokens each, and two threads that copy. The products read 64 rows of x for every 64 tokens,
// of which x_rows were copied: the others are whatever the ring holds, and so are the accumulators of their rows, which
// are not stored.
// Traffic: the weight once from memory (again for every group_tokens token tiles), x once; from L2 into shared memory
// x_rows + kFeatures rows of k for each tile.
template <int kWarpgroups, int kBlocks, int kFeatures>
__global__ void __launch_bounds__(LinearTraits<kWarpgroups, kBlocks, kFeatures>::kThreads, 1)
    LinearTileKernel(const __grid_constant__ LinearKernelArgs args) {
  using Traits = LinearTraits<kWarpgroups, kBlocks, kFeatures>;
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
    if constexpr (kWarpgroups > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int thread = threadIdx.x - Traits::kConsumers;
    if (thread == 0) {  // reads what no earlier kernel writes, so it does not wait for one
      CopyTiles<Traits, kFeatures, LinearOperand::kWeight>(args, ring);
    } else if (thread == 32) {
      AwaitPreviousKernel();
      CopyTiles<Traits, kFeatures, LinearOperand::kX>(args, ring);
    }
  } else {
    if constexpr (kWarpgroups > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    ConsumeTiles<Traits, kBlocks, kFeatures>(args, ring);
  }
}

// The kernel among `kFeatures`... that a tile names.
template <int kWarpgroups, int kBlocks, int... kFeatures>
LinearKernel FindWidth(std::integer_sequence<int, kFeatures...>, int features) {
  LinearKernel found = nullptr;
  ((features == kFeatures ? found = LinearTileKernel<kWarpgroups, kBlocks, kFeatures> : found), ...);
  return found;
}

#endif  // __CUDACC__

}  // namespace lockstep::cuda

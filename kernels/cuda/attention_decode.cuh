// What the decode kernels share: which keys a query sees, how they are found in the pages, and the two matrix products'
// operands.
#pragma once

#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_math.cuh"
#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/warp_arrive.cuh"

namespace lockstep::cuda {

constexpr int kDecodeHeadDim = 128;
constexpr int kDecodeBlock = static_cast<int>(kKvBlock);
constexpr int kDecodeBlockBytes = static_cast<int>(kKvBlockBytes);

// The keys that the query at `position` sees, the blocks of 64 and the tiles they lie in.
template <class Order>
struct KeyRange {
  int first_key, first_block, last_block, first_tile, tiles;

  __device__ KeyRange(int position, int window) {
    first_key = window > 0 ? max(0, position - window + 1) : 0;
    first_block = first_key / kDecodeBlock;
    last_block = position / kDecodeBlock;
    first_tile = first_key / Order::kKeys;
    tiles = position / Order::kKeys - first_tile + 1;
  }
  // The tile that the row takes as its `step`th.
  __device__ int Tile(int step) const { return Order::kForward ? first_tile + step : first_tile + tiles - 1 - step; }
  __device__ bool HasBlock(int block) const { return block >= first_block && block <= last_block; }
};

// A ring's slots, counted alike by those who fill and those who read it.
template <int kSlots>
struct RingIndex {
  int slot = 0;
  uint32_t phase = 0;

  __device__ void Next() {
    if (++slot < kSlots) return;
    slot = 0;
    phase ^= 1;
  }
};

// Finds a sequence's blocks in its pages. The whole warp calls: lanes hold 32 blocks' places at a time, so that the
// table's latency and the divisions come once for 2,048 keys. Entries of blocks out of range are not read.
template <class Order>
class PageCursor {
 public:
  __device__ PageCursor(const AttentionArgs& args, const DevicePiece& piece, const KeyRange<Order>& range)
      : args_(args), pages_(args.batch.pages + piece.page_begin), range_(range) {}

  // The pages' row of 256 bytes where the block begins, in kv head 0's keys; anything for a block out of range.
  __device__ int Row(int block) {
    if (block / 32 != held_) {
      held_ = block / 32;
      const int mine = held_ * 32 + static_cast<int>(threadIdx.x % 32);
      const int blocks_a_page = args_.page_size / kDecodeBlock;
      if (range_.HasBlock(mine)) {
        row_ = pages_[mine / blocks_a_page] * args_.page_rows + mine % blocks_a_page * kDecodeBlock;
      }
    }
    return __shfl_sync(0xFFFFFFFFu, row_, block % 32);
  }

 private:
  const AttentionArgs& args_;
  const int32_t* pages_;
  const KeyRange<Order>& range_;
  int held_ = -1;
  int row_ = 0;
};

// The queries as the second operand: this thread's column is query head `column` of the kv head's group.
__device__ inline void LoadQueries(const AttentionArgs& args, const DevicePiece& piece, int64_t head,
                                   uint32_t (&q)[16]) {
  const __nv_bfloat16* row = args.q + piece.row_begin * args.q_stride + head * kDecodeHeadDim + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 16; ++i) q[i] = *reinterpret_cast<const uint32_t*>(row + 8 * i);
}

// Byte offset in a block: KvChunkOffset() by the thread's own width of integers.
__device__ inline uint32_t BlockOffset(int position, int chunk) {
  return static_cast<uint32_t>(chunk / 4 * static_cast<int>(kKvPlaneBytes)) + Swizzled64(position, chunk % 4);
}

// Scores of keys [first_row, first_row + 16) of a block of k and all columns: the chain over the head dimension. The
// thread gets keys lane / 4 and lane / 4 + 8 of columns 2 (lane % 4) and the next.
__device__ inline void Scores16(const std::byte* k, int first_row, const uint32_t (&q)[16], float (&s)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = first_row + lane % 16;
  const uint32_t base = SharedAddress(k);
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = 0.0f;
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t a[4];
    LoadMatrices(a, base + BlockOffset(row, step * 2 + lane / 16));
    Mma16(s, a, q[2 * step], q[2 * step + 1]);
  }
}

__device__ inline uint32_t KeepKeys(int first_key, int position) {
  return (first_key <= position ? 0x0000FFFFu : 0u) | (first_key + 1 <= position ? 0xFFFF0000u : 0u);
}

// Zeroes what a (values of 16 keys from first_key on, transposed) has of keys after `position`: not written yet, they
// may be NaN.
__device__ inline void KeepWrittenValues(uint32_t (&a)[4], int first_key, int position) {
  if (first_key + 15 <= position) return;
  const int quad = static_cast<int>(threadIdx.x % 4);
  const uint32_t low = KeepKeys(first_key + 2 * quad, position);
  const uint32_t high = KeepKeys(first_key + 8 + 2 * quad, position);
  a[0] &= low;
  a[1] &= low;
  a[2] &= high;
  a[3] &= high;
}

}  // namespace lockstep::cuda

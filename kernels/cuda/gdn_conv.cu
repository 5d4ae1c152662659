#include <algorithm>

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/gdn_conv.h"
#include "kernels/cuda/gdn_gates.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarp * kWarpsPerBlock;
constexpr int kVector = 8;  // channels of a thread
constexpr int kTailRows = kGdnConvWidth - 1;
constexpr int kDecodeRows = 2;  // of a thread, at most
constexpr int kGroup = 4;       // prefill rows that a thread works on at once
constexpr int kTileRows = 64;
constexpr float kL2NormEps = 1e-6f;  // fla's

using Vector = Bf16s<kVector>;

struct Launch {
  GdnConvParams conv;
  GdnGatesParams gates;  // no rows: no gates
  int channels;
  int key_slabs;         // blocks over the channels of q and k; those over v follow
  int slabs;             // blocks over all channels
  int decode_items;      // blocks of a slab over decode pieces; those over prefill runs follow
  unsigned conv_blocks;  // slabs * items; the gates' blocks follow
};

// What a thread works on: kVector channels.
struct Lane {
  int channel;
  bool active;  // the channels exist; the others only take part in the shuffles
};

// kHeadLanes lanes share a head of q or k.
template <int kHeadLanes>
__device__ Lane KeyLane(const Launch& launch, int slab) {
  const int index = slab * kThreads + static_cast<int>(threadIdx.x);
  const int head = index / kHeadLanes;
  const int column = index % kHeadLanes * kVector;
  const int key_dim = static_cast<int>(launch.conv.key_dim);
  return {head * key_dim + column, head < 2 * launch.conv.key_heads && column < key_dim};
}

__device__ Lane ValueLane(const Launch& launch, int slab) {
  const int column = (slab * kThreads + static_cast<int>(threadIdx.x)) * kVector;
  return {launch.channels - static_cast<int>(launch.conv.value_width) + column, column < launch.conv.value_width};
}

// As in memory: four taps of a channel side by side, two channels a vector.
struct Taps {
  Vector channels[kVector / 2];
};

__device__ Taps LoadTaps(const GdnConvParams& p, const Lane& lane) {
  Taps taps = {};
  if (!lane.active) return taps;
  const __nv_bfloat16* from = p.weight + static_cast<int64_t>(lane.channel) * kGdnConvWidth;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) taps.channels[i] = Load<kVector>(from + i * kVector);
  return taps;
}

template <bool kOneCast>
__device__ Floats<kVector> Activate(Floats<kVector> sums) {
  if constexpr (!kOneCast) sums = RoundBf16(sums);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sums.v[i] = kOneCast ? __fmul_rn(sums.v[i], TritonSigmoid(sums.v[i])) : SiluOfBf16(sums.v[i]);
  }
  return sums;
}

// x: the rows under the taps, oldest first. The products of bf16 values are exact in fp32, so a fused multiply-add is
// the product and the sum. kHeadLanes: of q and k, to be normalised; 0: of v.
template <int kHeadLanes, bool kOneCast>
__device__ Vector ConvolveRow(const Taps& taps, const Vector& x0, const Vector& x1, const Vector& x2,
                              const Vector& x3) {
  const Floats<kVector> x[kGdnConvWidth] = {Unpack(x0), Unpack(x1), Unpack(x2), Unpack(x3)};
  Floats<kVector> sums;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const Floats<kVector> w = Unpack(taps.channels[i / 2]);
    sums.v[i] = 0.0f;
#pragma unroll
    for (int tap = 0; tap < kGdnConvWidth; ++tap) {
      sums.v[i] = __fmaf_rn(x[tap].v[i], w.v[i % 2 * kGdnConvWidth + tap], sums.v[i]);
    }
  }
  const Vector y = Pack(Activate<kOneCast>(sums));
  if constexpr (kHeadLanes == 0) return y;
  Floats<kVector> normalised = Unpack(y);
  const float sum = TritonSumOfSquares<kHeadLanes>(normalised);
  const float inverse = DivideFull(1.0f, SqrtApprox(__fadd_rn(sum, kL2NormEps)));
#pragma unroll
  for (int i = 0; i < kVector; ++i) normalised.v[i] = __fmul_rn(normalised.v[i], inverse);
  return Pack(normalised);
}

// The tail's row of a position of the sequence in `slot`.
__device__ __nv_bfloat16* TailRow(const Launch& launch, const Lane& lane, int slot, int position) {
  char* tail = static_cast<char*>(launch.conv.tail) + slot * launch.conv.slot_stride;
  return reinterpret_cast<__nv_bfloat16*>(tail) + position % kTailRows * launch.channels + lane.channel;
}

// A decode piece with the rows under the taps.
struct DecodeRow {
  DevicePiece piece;
  Vector x[kGdnConvWidth];
};

__device__ DecodeRow LoadDecodeRow(const Launch& launch, const Lane& lane, int index) {
  const GdnConvParams& p = launch.conv;
  DecodeRow row = {};
  if (index >= p.batch.decode_pieces) return row;
  row.piece = p.batch.pieces[index];
  if (row.piece.row_count == 0 || !lane.active) return row;
#pragma unroll
  for (int tap = 0; tap < kTailRows; ++tap) {
    const int position = row.piece.position - kTailRows + tap;
    if (position >= 0) row.x[tap] = Load<kVector>(TailRow(launch, lane, row.piece.slot, position));
  }
  row.x[kTailRows] = Load<kVector>(p.in + row.piece.row_begin * p.in_stride + lane.channel);
  return row;
}

// Decode pieces from `first` on. A thread alone reads and replaces its channels of their tails. The code of a row
// stands once: a small batch runs it from a cold instruction cache.
template <int kHeadLanes, bool kOneCast>
__device__ void DecodeRows(const Launch& launch, const Lane& lane, int first) {
  static_assert(kDecodeRows == 2);
  const GdnConvParams& p = launch.conv;
  DecodeRow row = LoadDecodeRow(launch, lane, first);
  DecodeRow next = LoadDecodeRow(launch, lane, first + 1);
  const Taps taps = LoadTaps(p, lane);
#pragma unroll 1
  for (int i = 0; i < kDecodeRows; ++i) {
    if (row.piece.row_count > 0) {
      const Vector y = ConvolveRow<kHeadLanes, kOneCast>(taps, row.x[0], row.x[1], row.x[2], row.x[3]);
      if (lane.active) {
        Store(y, p.out + row.piece.row_begin * p.out_stride + lane.channel);
        Store(row.x[kTailRows], TailRow(launch, lane, row.piece.slot, row.piece.position));
      }
    }
    row = next;
    next.piece.row_count = 0;
  }
}

// Copies to shared memory in the background; zeros without a source. Seen by the thread that copied, after
// AwaitCopies<kLater>: all groups but the kLater youngest are complete.
__device__ void CopyAsync(uint4* to, const __nv_bfloat16* from, bool exists) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(exists ? 16 : 0)
      : "memory");
}

__device__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kLater>
__device__ void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// Which rows of a piece a block works on.
struct Run {
  DevicePiece piece;
  int begin;  // from the piece's start: a multiple of kRunRows
  int end;    // begin: nothing to do
};

// Of the runs that begin in a tile, number `index`.
template <int kRunRows>
__device__ Run FindRun(const DeviceBatch& batch, int tile_index, int index) {
  const DeviceTile tile = batch.tiles[tile_index];
  if (tile.row_count == 0) return {};
  const DevicePiece piece = batch.pieces[tile.piece];
  const int offset = tile.row_begin - piece.row_begin;
  const int begin = (offset + kRunRows - 1) / kRunRows * kRunRows + index * kRunRows;
  if (begin >= offset + tile.row_count) return {};
  return {piece, begin, min(begin + kRunRows, piece.row_count)};
}

// A thread's own channels of kTailRows + kRunRows rows pass through shared memory, all in flight from the start. The
// run with row 0 alone reads the tail and alone replaces it, each channel by one thread: no other order is needed.
template <int kHeadLanes, bool kOneCast, int kRunRows>
__device__ void PrefillRun(const Launch& launch, const Lane& lane, const Run& run,
                           uint4 (&rows)[kTailRows + kRunRows][kThreads]) {
  constexpr int kGroups = kRunRows / kGroup;
  const GdnConvParams& p = launch.conv;
  const int thread = static_cast<int>(threadIdx.x);
  const __nv_bfloat16* in = p.in + run.piece.row_begin * p.in_stride + lane.channel;  // of the piece's row 0
#pragma unroll
  for (int i = 0; i < kTailRows; ++i) {
    const int row = run.begin - kTailRows + i;
    const int position = run.piece.position + row;
    const __nv_bfloat16* from = row < 0 ? TailRow(launch, lane, run.piece.slot, position) : in + row * p.in_stride;
    CopyAsync(&rows[i][thread], position < 0 ? p.in : from, position >= 0 && lane.active);
  }
#pragma unroll 1
  for (int i = 0; i < kRunRows; i += kGroup) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int row = run.begin + i + j;
      const bool exists = row < run.end && lane.active;
      CopyAsync(&rows[kTailRows + i + j][thread], exists ? in + row * p.in_stride : p.in, exists);
    }
    CommitCopies();
  }
  const Taps taps = LoadTaps(p, lane);
  __nv_bfloat16* out = p.out + (run.piece.row_begin + int64_t{run.begin}) * p.out_stride + lane.channel;
  const int count = run.end - run.begin;
#pragma unroll 1
  for (int i = 0; i < count; i += kGroup) {
    AwaitCopies<kGroups - 1>();
    CommitCopies();  // of nothing: one group more has to be complete in the next round
    Vector x[kTailRows + kGroup];
#pragma unroll
    for (int j = 0; j < kTailRows + kGroup; ++j) {
      const uint4 raw = rows[i + j][thread];
      x[j] = {{raw.x, raw.y, raw.z, raw.w}};
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Vector y = ConvolveRow<kHeadLanes, kOneCast>(taps, x[j], x[j + 1], x[j + 2], x[j + 3]);
      if (i + j < count && lane.active) Store(y, out);
      out += p.out_stride;
    }
  }
  if (run.begin != 0 || !lane.active) return;
  for (int row = max(0, run.piece.row_count - kTailRows); row < run.piece.row_count; ++row) {
    Store(Load<kVector>(in + row * p.in_stride), TailRow(launch, lane, run.piece.slot, run.piece.position + row));
  }
}

// Grid: (slabs * (decode pieces / 2 + tiles * 64 / kRunRows), then the gates' blocks), 128 threads, a thread 8 channels
// of two decode rows or of one run of prefill rows; neighbouring blocks are neighbouring slabs of channels. In the
// slabs of q and k a head has 4, 8, 16 or 32 lanes (96 wide: 12 of 16 have channels). Traffic a channel: decode 12
// bytes (3 tail rows and the row read; out and the tail's row written), prefill 4 bytes (the 3 rows before a run and
// the weights come from L2). kRunRows: rows of a prefill run; 0: decode rows only.
template <int kHeadLanes, bool kOneCast, int kRunRows>
__global__ void __launch_bounds__(kThreads, kRunRows > 0 ? 5 : 6) GdnConvKernel(const __grid_constant__ Launch launch) {
  FollowPreviousKernel();
  if (blockIdx.x >= launch.conv_blocks) {
    GdnGate(launch.gates, (blockIdx.x - launch.conv_blocks) * kThreads + threadIdx.x);
    return;
  }
  const int slab = static_cast<int>(blockIdx.x) % launch.slabs;
  const int item = static_cast<int>(blockIdx.x) / launch.slabs;
  const bool is_key = slab < launch.key_slabs;
  const Lane lane = is_key ? KeyLane<kHeadLanes>(launch, slab) : ValueLane(launch, slab - launch.key_slabs);
  if (kRunRows == 0 || item < launch.decode_items) {
    if (is_key) {
      DecodeRows<kHeadLanes, kOneCast>(launch, lane, item * kDecodeRows);
    } else {
      DecodeRows<0, kOneCast>(launch, lane, item * kDecodeRows);
    }
    return;
  }
  if constexpr (kRunRows > 0) {
    constexpr int kRuns = kTileRows / kRunRows;
    __shared__ uint4 rows[kTailRows + kRunRows][kThreads];
    const int run_index = item - launch.decode_items;
    const Run run = FindRun<kRunRows>(launch.conv.batch, run_index / kRuns, run_index % kRuns);
    if (run.begin >= run.end) return;
    if (is_key) {
      PrefillRun<kHeadLanes, kOneCast, kRunRows>(launch, lane, run, rows);
    } else {
      PrefillRun<0, kOneCast, kRunRows>(launch, lane, run, rows);
    }
  }
}

int64_t HeadLanes(const GdnConvParams& params) {
  int64_t lanes = 4;
  while (lanes * kVector < params.key_dim) lanes *= 2;
  return lanes;
}

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int kLongRun = 16;
constexpr int kShortRun = kGroup;

// Long runs read fewer rows twice; short ones give a small batch more threads.
int RunRows(const DeviceBatch& batch) {
  constexpr int kManyRows = 1024;
  if (batch.tile_count == 0) return 0;
  return batch.rows - batch.decode_pieces > kManyRows ? kLongRun : kShortRun;
}

template <int kHeadLanes, bool kOneCast>
auto FindKernel(int run_rows) {
  if (run_rows == kLongRun) return GdnConvKernel<kHeadLanes, kOneCast, kLongRun>;
  return run_rows == kShortRun ? GdnConvKernel<kHeadLanes, kOneCast, kShortRun>
                               : GdnConvKernel<kHeadLanes, kOneCast, 0>;
}

template <int kHeadLanes>
absl::Status LaunchKernel(const Launch& launch, int run_rows, unsigned blocks, cudaStream_t stream) {
  const bool one_cast = launch.conv.casts == ConvCasts::kOne;
  const auto kernel = one_cast ? FindKernel<kHeadLanes, true>(run_rows) : FindKernel<kHeadLanes, false>(run_rows);
  return LaunchOverlapped("GdnConv", kernel, blocks, kThreads, stream, launch);
}

absl::Status LaunchBoth(const GdnConvParams& params, const GdnGatesParams& gates, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  const int64_t head_lanes = HeadLanes(params);
  const int64_t key_slabs = CeilDiv(2 * params.key_heads * head_lanes, kThreads);
  const int64_t slabs = key_slabs + CeilDiv(params.value_width, kVector * kThreads);
  const int run_rows = RunRows(params.batch);
  const int64_t runs = run_rows == 0 ? 0 : params.batch.tile_count * int64_t{kTileRows / run_rows};
  const int64_t decode_items = CeilDiv(params.batch.decode_pieces, kDecodeRows);
  const int64_t items = decode_items + runs;
  const int64_t gate_blocks = CeilDiv(gates.rows * gates.heads, kThreads);
  const int64_t blocks = slabs * items + gate_blocks;
  if (blocks == 0) return absl::OkStatus();
  if (blocks > INT32_MAX) return BadField("GdnConvParams.batch.tile_count", params.batch.tile_count, "a smaller grid");
  const Launch launch = {.conv = params,
                         .gates = gates,
                         .channels = static_cast<int>(params.channels()),
                         .key_slabs = static_cast<int>(key_slabs),
                         .slabs = static_cast<int>(slabs),
                         .decode_items = static_cast<int>(decode_items),
                         .conv_blocks = static_cast<unsigned>(slabs * items)};
  switch (head_lanes) {
    case 4:
      return LaunchKernel<4>(launch, run_rows, static_cast<unsigned>(blocks), stream);
    case 8:
      return LaunchKernel<8>(launch, run_rows, static_cast<unsigned>(blocks), stream);
    case 16:
      return LaunchKernel<16>(launch, run_rows, static_cast<unsigned>(blocks), stream);
    default:
      return LaunchKernel<32>(launch, run_rows, static_cast<unsigned>(blocks), stream);
  }
}

}  // namespace

absl::Status GdnConvParams::Validate() const {
  constexpr int64_t kKeyDims[] = {32, 64, 96, 128, 192, 256};  // widths whose l2norm was compared with fla's
  if (std::find(std::begin(kKeyDims), std::end(kKeyDims), key_dim) == std::end(kKeyDims)) {
    return BadField("GdnConvParams.key_dim", key_dim, "32, 64, 96, 128, 192 or 256");
  }
  if (key_heads <= 0 || key_heads > 1024) return BadField("GdnConvParams.key_heads", key_heads, "1 to 1024");
  if (value_width <= 0 || value_width % kVector != 0 || value_width > 1 << 20) {
    return BadField("GdnConvParams.value_width", value_width, "a multiple of 8 from 8 to 2^20");
  }
  absl::Status status = CheckPointer("GdnConvParams.in", in, sizeof(Vector));
  status.Update(CheckPointer("GdnConvParams.weight", weight, sizeof(Vector)));
  status.Update(CheckPointer("GdnConvParams.out", out, sizeof(Vector)));
  status.Update(CheckPointer("GdnConvParams.tail", tail, sizeof(Vector)));
  status.Update(CheckStride("GdnConvParams.in_stride", in_stride, channels(), kVector));
  status.Update(CheckStride("GdnConvParams.out_stride", out_stride, channels(), kVector));
  status.Update(CheckStride("GdnConvParams.slot_stride", slot_stride, GdnConvTailBytes(channels()), sizeof(Vector)));
  if (!status.ok()) return status;
  if (batch.decode_pieces < 0 || batch.decode_pieces > batch.piece_count) {
    return BadField("GdnConvParams.batch.decode_pieces", batch.decode_pieces, "0 to batch.piece_count");
  }
  if (batch.tile_count < 0) return BadField("GdnConvParams.batch.tile_count", batch.tile_count, "0 or more");
  if (batch.piece_count > 0) {
    status.Update(CheckPointer("GdnConvParams.batch.pieces", batch.pieces, alignof(DevicePiece)));
  }
  if (batch.tile_count > 0) {
    status.Update(CheckPointer("GdnConvParams.batch.tiles", batch.tiles, alignof(DeviceTile)));
    if (batch.decode_pieces == batch.piece_count) {
      status.Update(BadField("GdnConvParams.batch.tile_count", batch.tile_count, "0 without prefill pieces"));
    }
  }
  return status;
}

absl::Status LaunchGdnConv(const GdnConvParams& params, cudaStream_t stream) {
  return LaunchBoth(params, GdnGatesParams(), stream);
}

absl::Status LaunchGdnConvAndGates(const GdnConvParams& params, const GdnGatesParams& gates, cudaStream_t stream) {
  if (absl::Status status = gates.Validate(); !status.ok()) return status;
  return LaunchBoth(params, gates, stream);
}

}  // namespace lockstep::cuda

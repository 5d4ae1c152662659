// Which tokens a rank or a mass cuts off: radix selection over a row, exact, ties by ascending id. Device code.
#pragma once

#include <cstdint>

#include "kernels/cuda/sampling/cluster.cuh"
#include "kernels/cuda/sampling/row_math.cuh"
#include "kernels/cuda/sampling/row_reader.cuh"

namespace lockstep::cuda {

inline constexpr int kBins = 256;
inline constexpr int kMaxSegments = 1024;  // vocabularies up to 262,144

// The tokens kept: those above -inf that rank up to `key`, `id` of it, and have at least the weight `min_p`.
struct Kept {
  uint32_t key = 0xFFFFFFFFu;
  int32_t id = INT32_MAX;
  float min_p = 0.0f;

  __device__ bool Rank(uint32_t k, int i) const { return k < key || (k == key && i <= id); }
};

struct SelectShared {
  uint32_t low[kBins];  // mass of a bin, or its count
  uint32_t high[kBins];
  uint64_t segment[kMaxSegments];  // block 0's: mass or count of a segment
  uint64_t needed;                 // within the bin found
  uint64_t found;                  // of the bin found
  uint64_t total;                  // of all bins
  int32_t bin;
  int32_t id;
};

// What is summed up in rank order.
enum class Amount { kCount, kMass };

// Bins of max - y, 1/8 each; the last takes the rest. Never descending in rank order, equal for equal y.
__device__ inline int LinearBin(float max, float y) {
  return static_cast<int>(fminf(__fmul_rn(__fsub_rn(max, y), 8.0f), kBins - 1.0f));
}

__device__ inline void ClearBins(SelectShared& shared) {
  if (threadIdx.x < kBins) shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
  __syncthreads();
}

// A shared 64-bit addition in two 32-bit ones; the second is rarely needed.
__device__ inline void AddToBin(SelectShared& shared, int bin, uint64_t amount) {
  const uint32_t low = static_cast<uint32_t>(amount);
  const uint32_t before = atomicAdd(&shared.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before + low < before ? 1 : 0);
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

// The bin at which the amounts of all blocks, added up in order, reach `needed` (of the total, if needed is 0 for mass:
// see NeededMass). Leaves bin, needed, found and total in every block's shared memory. By the block's first warp.
template <int kBlocks>
__device__ void FindBin(Amount amount, uint64_t needed, uint64_t top_p, SelectShared& shared) {
  constexpr int kPerLane = kBins / kWarp;
  uint64_t part[kPerLane];
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    part[i] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const SelectShared* of = TaskCluster<kBlocks>::Of(b, &shared);
      const int bin = Lane() * kPerLane + i;
      part[i] += (static_cast<uint64_t>(of->high[bin]) << 32) + of->low[bin];
    }
    sum += part[i];
  }
  const uint64_t until = WarpPrefixSum(sum);
  const uint64_t total = __shfl_sync(kAllLanes, until, kWarp - 1);
  if (top_p != 0) {
    // ceil(top_p * total): 48 by 62 bits.
    const uint64_t low = top_p * total;
    const uint64_t high = __umul64hi(top_p, total);
    const uint64_t rounded = low + ((uint64_t{1} << 48) - 1);
    needed = ((high + (rounded < low ? 1 : 0)) << 16) | (rounded >> 48);
  }
  if (Lane() == 0) {
    shared.total = total;
    shared.bin = -1;
  }
  __syncwarp();
  if (until >= needed && until - sum < needed) {
    needed -= until - sum;
    bool open = true;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (open && part[i] >= needed) {
        open = false;
        shared.bin = Lane() * kPerLane + i;
        shared.needed = needed;
        shared.found = part[i];
      }
      if (open) needed -= part[i];
    }
  }
}

// The segment of block 0's shared.segment in which the running sum reaches `needed` (1 to the total); its rest of
// `needed`. By one warp of block 0, all lanes.
__device__ inline int FindSegment(const SelectShared& shared, int segments, uint64_t& needed) {
  const int per_lane = (segments + kWarp - 1) / kWarp;
  const int begin = min(Lane() * per_lane, segments);
  const int end = min(begin + per_lane, segments);
  uint64_t sum = 0;
  for (int s = begin; s < end; ++s) sum += shared.segment[s];
  const uint64_t until = WarpPrefixSum(sum);
  int segment = 0;
  uint64_t rest = needed;
  const bool here = until >= needed && until - sum < needed;
  if (here) {
    rest = needed - (until - sum);
    for (segment = begin; rest > shared.segment[segment]; ++segment) rest -= shared.segment[segment];
  }
  const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
  needed = __shfl_sync(kAllLanes, rest, lane);
  return __shfl_sync(kAllLanes, segment, lane);
}

// Among the lanes' 8 amounts each, in order of id, the place at which the running sum reaches `needed`: an offset into
// the segment. All lanes of a warp.
__device__ inline int FindInSegment(const uint64_t (&amount)[kLaneIds], uint64_t needed) {
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneIds; ++i) sum += amount[i];
  const uint64_t until = WarpPrefixSum(sum);
  const bool here = until >= needed && until - sum < needed;
  int offset = 0;
  if (here) {
    uint64_t rest = needed - (until - sum);
    bool open = true;
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      if (open && amount[i] >= rest) {
        open = false;
        offset = Lane() * kLaneIds + i;
      }
      if (open) rest -= amount[i];
    }
  }
  const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
  return __shfl_sync(kAllLanes, offset, lane);
}

// Of the tokens that `kept` keeps, the rank at which their number reaches `count`, or their mass ceil(top_p * total):
// `kept` with that rank. Unchanged where there are no more than `count`. max: the row's largest y, finite.
template <int kBlocks, Amount kAmount>
__device__ Kept Select(const RowReader& row, float max, const Kept& kept, uint64_t count, uint64_t top_p,
                       SelectShared& shared) {
  using Cluster = TaskCluster<kBlocks>;
  const auto amount_of = [&](float y) {
    return kAmount == Amount::kCount ? uint64_t{1} : MassOf(Weight(__fsub_rn(y, max)));
  };
  // A token of an -inf y is no token; min_p is rarely set here.
  const auto is_kept = [&](float y, uint32_t key, int id) {
    return y != MinusInfinity() && kept.Rank(key, id) &&
           (kept.min_p == 0.0f || Weight(__fsub_rn(y, max)) >= kept.min_p);
  };

  ClearBins(shared);
  ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float y = row.Scaled(x[i]);
      if (!is_kept(y, row.Key(x[i], y), RowReader::FirstId(segment) + i)) continue;
      const uint64_t amount = amount_of(y);
      if (amount != 0) AddToBin(shared, LinearBin(max, y), amount);
    }
  });
  Cluster::Sync();
  if (WarpIndex() == 0) FindBin<kBlocks>(kAmount, count, top_p, shared);
  Cluster::Sync();
  const int bin = shared.bin;
  if (bin < 0) return kept;

  uint32_t prefix = 0;  // the digits found
  for (int digit = 0; digit < row.key_bits() / 8; ++digit) {
    const uint64_t needed = shared.needed;
    __syncthreads();
    ClearBins(shared);
    const int shift = 24 - 8 * digit;
    ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
#pragma unroll
      for (int i = 0; i < kLaneIds; ++i) {
        const float y = row.Scaled(x[i]);
        if (y == MinusInfinity() || LinearBin(max, y) != bin) continue;
        const uint32_t key = row.Key(x[i], y);
        if (digit > 0 && key >> (shift + 8) != prefix) continue;
        if (!is_kept(y, key, RowReader::FirstId(segment) + i)) continue;
        AddToBin(shared, static_cast<int>(key >> shift & 0xFFu), amount_of(y));
      }
    });
    Cluster::Sync();
    if (WarpIndex() == 0) FindBin<kBlocks>(kAmount, needed, 0, shared);
    Cluster::Sync();
    prefix = prefix << 8 | static_cast<uint32_t>(shared.bin);
  }

  // All tokens found have the same y. A bf16 key's lower half follows from its sign.
  Kept result = kept;
  result.key = prefix;
  if (row.key_bits() == 16) result.key = (prefix << 16) | ((prefix & 0x8000u) != 0 ? 0u : 0xFFFFu);
  result.id = result.key == kept.key ? kept.id : INT32_MAX;
  const float x = RankValue(result.key);
  const bool key_is_y = row.fp32 || row.scale.rounding == TemperatureRounding::kReciprocalBf16;
  const uint64_t each = amount_of(key_is_y ? x : row.Scaled(x));
  const uint64_t ties = (shared.needed + each - 1) / each;  // to keep
  if (ties * each == shared.found) return result;

  ForEachSegment<kBlocks>(row, [&](int segment, const float(&x)[kLaneIds]) {
    uint32_t here = 0;
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float y = row.Scaled(x[i]);
      const uint32_t key = row.Key(x[i], y);
      here += key == result.key && is_kept(y, key, RowReader::FirstId(segment) + i) ? 1 : 0;
    }
    here = __reduce_add_sync(kAllLanes, here);
    if (Lane() == 0) Cluster::Of(0, &shared)->segment[segment] = here;
  });
  Cluster::Sync();
  if (Cluster::rank() == 0 && WarpIndex() == 0) {
    uint64_t rest = ties;
    const int segment = FindSegment(shared, row.segments(), rest);
    float v[kLaneIds];
    row.Unpack(segment, row.Load(segment), v);
    uint64_t here[kLaneIds];
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float y = row.Scaled(v[i]);
      const uint32_t key = row.Key(v[i], y);
      here[i] = key == result.key && is_kept(y, key, RowReader::FirstId(segment) + i) ? 1 : 0;
    }
    const int id = segment * kSegmentIds + FindInSegment(here, rest);
    if (Lane() == 0) shared.id = id;
  }
  Cluster::Sync();
  result.id = Cluster::Of(0, &shared)->id;
  Cluster::Sync();
  return result;
}

}  // namespace lockstep::cuda

// One row of logits as the sampling passes see it: segments of 256 ids, a warp's step, 8 neighbours a lane. Device
// code.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/sampling/cluster.cuh"
#include "kernels/cuda/sampling/row_math.cuh"

namespace lockstep::cuda {

inline constexpr int kLaneIds = 8;
inline constexpr int kSegmentIds = kLaneIds * kWarp;

__device__ inline float LowBf16(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

__device__ inline float HighBf16(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

// y = x / T over a bf16 row, or over a row that was adjusted, in fp32.
struct RowReader {
  struct Raw {
    uint4 a, b;  // b: fp32 rows only
  };

  const void* data = nullptr;  // 16-byte aligned; readable up to the multiple of 8 after vocab
  bool fp32 = false;
  int32_t vocab = 0;
  bool scaled = false;
  TemperatureScale scale;

  __device__ int segments() const { return (vocab + kSegmentIds - 1) / kSegmentIds; }

  __device__ static int FirstId(int segment) { return segment * kSegmentIds + Lane() * kLaneIds; }

  __device__ Raw Load(int segment) const {
    const int id = FirstId(segment);
    Raw raw;
    raw.a = raw.b = make_uint4(0, 0, 0, 0);
    if (id >= vocab) return raw;
    if (fp32) {
      const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + id);
      raw.a = __ldg(from);
      raw.b = __ldg(from + 1);
    } else {
      raw.a = __ldg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(data) + id));
    }
    return raw;
  }

  // The lane's logits, before the temperature; -inf past the row's end.
  __device__ void Unpack(int segment, const Raw& raw, float (&x)[kLaneIds]) const {
    const uint32_t words[] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w, raw.b.x, raw.b.y, raw.b.z, raw.b.w};
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) {
      const float narrow = i % 2 == 0 ? LowBf16(words[i / 2]) : HighBf16(words[i / 2]);
      x[i] = fp32 ? __uint_as_float(words[i]) : narrow;
    }
    if ((segment + 1) * kSegmentIds <= vocab) return;
    const int left = vocab - FirstId(segment);
#pragma unroll
    for (int i = 0; i < kLaneIds; ++i) x[i] = i < left ? x[i] : MinusInfinity();
  }

  __device__ float Scaled(float x) const {
    return scaled ? scale.Apply(x) : x;
  }

  // Rank of a token among the row's. Division keeps bf16 logits apart (those above 2^-112, where T is at most 10^4), so
  // that theirs is as good as y's and has 16 significant bits.
  __device__ uint32_t Key(float x, float y) const {
    return RankKey(fp32 || scale.rounding == TemperatureRounding::kReciprocalBf16 ? y : x);
  }
  __device__ int key_bits() const {
    return fp32 ? 32 : 16;
  }

  // Four neighbours; id is a multiple of 4 and all are in the row.
  __device__ void LoadFour(int id, float (&x)[4]) const {
    if (fp32) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(data) + id));
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(data) + id));
      x[0] = LowBf16(v.x), x[1] = HighBf16(v.x), x[2] = LowBf16(v.y), x[3] = HighBf16(v.y);
    }
  }

  __device__ float At(int id) const {
    return fp32 ? __ldg(static_cast<const float*>(data) + id)
                : __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(data) + id));
  }
};

// body(segment, x) for the segments of this warp, one load ahead. A segment's lanes stay together.
template <int kBlocks, class Body>
__device__ void ForEachSegment(const RowReader& row, const Body& body) {
  const int step = kBlockWarps * kBlocks;
  int segment = TaskCluster<kBlocks>::rank() * kBlockWarps + WarpIndex();
  if (segment >= row.segments()) return;
  RowReader::Raw next = row.Load(segment);
  while (segment < row.segments()) {
    const RowReader::Raw raw = next;
    if (segment + step < row.segments()) next = row.Load(segment + step);
    float x[kLaneIds];
    row.Unpack(segment, raw, x);
    body(segment, x);
    segment += step;
  }
}

}  // namespace lockstep::cuda

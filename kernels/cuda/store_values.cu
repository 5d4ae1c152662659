#include "kernels/cuda/store_values.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda/params.h"
#include "kernels/digest_math.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 256;
// Enough to keep the memory busy, few enough to leave most multiprocessors to the steps.
constexpr int kMaxBlocks = 64;
constexpr int kGroup = 4;  // values a thread takes at once: 8 or 16 bytes
constexpr uintptr_t kAlignment = 16;

static_assert(sizeof(unsigned long long) == sizeof(uint64_t));

// Values [0, count) of a group, with zeros after them: as words (one, or two of fp32) and as numbers.
struct Group {
  uint64_t words[2];
  float v[kGroup];
};

__device__ Group LoadGroup(const std::byte* from, DType dtype, int64_t group, int count) {
  Group g = {};
  if (dtype == DType::kF32) {
    const auto* p = reinterpret_cast<const uint32_t*>(from) + group * kGroup;
    uint32_t x[kGroup] = {};
    if (count == kGroup) {
      const uint4 all = *reinterpret_cast<const uint4*>(p);
      x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    } else {
      for (int i = 0; i < count; ++i) x[i] = p[i];
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      g.v[i] = __uint_as_float(x[i]);
      g.words[i / 2] |= static_cast<uint64_t>(x[i]) << (i % 2 * 32);
    }
    return g;
  }
  const auto* p = reinterpret_cast<const uint16_t*>(from) + group * kGroup;
  if (count == kGroup) {
    g.words[0] = *reinterpret_cast<const uint64_t*>(p);
  } else {
    for (int i = 0; i < count; ++i) g.words[0] |= static_cast<uint64_t>(p[i]) << (i * 16);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const auto bits = static_cast<uint16_t>(g.words[0] >> (i * 16));
    g.v[i] = dtype == DType::kBF16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                   : __half2float(__ushort_as_half(bits));
  }
  return g;
}

// The numbers as words of `dtype`; what is past the group's count must be zero.
__device__ void PackWords(const float (&v)[kGroup], DType dtype, uint64_t (&words)[2]) {
  if (dtype == DType::kF32) {
    words[0] = __float_as_uint(v[0]) | static_cast<uint64_t>(__float_as_uint(v[1])) << 32;
    words[1] = __float_as_uint(v[2]) | static_cast<uint64_t>(__float_as_uint(v[3])) << 32;
    return;
  }
  words[0] = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    words[0] |= static_cast<uint64_t>(__bfloat16_as_ushort(__float2bfloat16_rn(v[i]))) << (i * 16);
  }
  words[1] = 0;
}

__device__ void StoreWords(const uint64_t (&words)[2], std::byte* to, DType dtype, int64_t group, int count) {
  const int size = dtype == DType::kF32 ? 4 : 2;
  std::byte* at = to + group * kGroup * size;
  if (count == kGroup) {
    *reinterpret_cast<uint64_t*>(at) = words[0];
    if (size == 4) *reinterpret_cast<uint64_t*>(at + 8) = words[1];
    return;
  }
  for (int i = 0; i < count; ++i) {
    if (size == 4) {
      reinterpret_cast<uint32_t*>(at)[i] = static_cast<uint32_t>(words[i / 2] >> (i % 2 * 32));
    } else {
      reinterpret_cast<uint16_t*>(at)[i] = static_cast<uint16_t>(words[0] >> (i * 16));
    }
  }
}

__device__ uint64_t WordSum(const uint64_t (&words)[2], DType dtype, int64_t index, int count) {
  const int size = dtype == DType::kF32 ? 4 : 2;
  const auto first = static_cast<uint64_t>(index * size / 8);
  const int used = (count * size + 7) / 8;
  return DigestTerm(words[0], first) + (used > 1 ? DigestTerm(words[1], first + 1) : 0);
}

__device__ uint64_t WarpSum(uint64_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(value), distance);
  }
  return value;
}

// Grid: at most kMaxBlocks, each thread groups of 4 values in turn.
// Traffic: the values once as sent, once as stored. Sums of integers: their order does not show.
__global__ void __launch_bounds__(kThreads) StoreValuesKernel(const __grid_constant__ StoreValuesParams params) {
  const int64_t groups = (params.count + kGroup - 1) / kGroup;
  uint64_t sent_sum = 0, held_sum = 0, non_finite = 0;
  for (int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x; group < groups; group += gridDim.x * kThreads) {
    const int count = static_cast<int>(min(params.count - group * kGroup, int64_t{kGroup}));
    Group g = LoadGroup(params.from, params.sent, group, count);
    sent_sum += WordSum(g.words, params.sent, params.sent_index + group * kGroup, count);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      non_finite += !isfinite(g.v[i]);
      if (params.held == DType::kBF16) g.v[i] = __bfloat162float(__float2bfloat16_rn(g.v[i]));
    }
    uint64_t words[2];
    PackWords(g.v, params.held, words);
    held_sum += WordSum(words, params.held, params.held_index + group * kGroup, count);
    if (params.stored != params.held) PackWords(g.v, params.stored, words);
    StoreWords(words, params.to, params.stored, group, count);
  }
  if (params.tally == nullptr) return;
  sent_sum = WarpSum(sent_sum);
  held_sum = WarpSum(held_sum);
  non_finite = WarpSum(non_finite);
  if (threadIdx.x % 32 != 0) return;
  auto add = [](uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  };
  add(&params.tally->sent_sum, sent_sum);
  add(&params.tally->held_sum, held_sum);
  if (non_finite > 0) add(&params.tally->non_finite, non_finite);
}

}  // namespace

absl::Status StoreValuesParams::Validate() const {
  if (count < 0) return BadField("StoreValuesParams.count", count, "0 or more");
  if (sent_index < 0 || sent_index % kGroup != 0) {
    return BadField("StoreValuesParams.sent_index", sent_index, "a multiple of 4");
  }
  if (held_index < 0 || held_index % kGroup != 0) {
    return BadField("StoreValuesParams.held_index", held_index, "a multiple of 4");
  }
  absl::Status status = CheckPointer("StoreValuesParams.from", from, kAlignment);
  status.Update(CheckPointer("StoreValuesParams.to", to, sizeof(uint64_t)));
  status.Update(CheckBf16OrF32("StoreValuesParams.held", held));
  status.Update(CheckBf16OrF32("StoreValuesParams.stored", stored));
  if (held == DType::kF32 && stored != DType::kF32) {
    status.Update(BadField("StoreValuesParams.stored", std::string(DTypeName(stored)), "float32, as values are held"));
  }
  return status;
}

absl::Status LaunchStoreValues(const StoreValuesParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.count == 0) return absl::OkStatus();
  const int64_t threads = (params.count + kGroup - 1) / kGroup;
  const int64_t blocks = std::min<int64_t>((threads + kThreads - 1) / kThreads, kMaxBlocks);
  StoreValuesKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return LaunchStatus("StoreValues");
}

}  // namespace lockstep::cuda

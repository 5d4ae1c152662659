#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda/params.h"
#include "kernels/cuda/store_values.h"
#include "kernels/digest_math.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 256;
// With the loads that a thread has under way, enough to keep up with the links between GPUs many times over.
constexpr int kMaxBlocks = 128;
constexpr int kUnroll = 8;
constexpr int kGroup = 4;  // values a thread takes at once: 8 or 16 bytes

static_assert(sizeof(unsigned long long) == sizeof(uint64_t));

// A group's values as they lie in memory: one word, or two of fp32. Zeros are past the end.
struct Raw {
  uint64_t words[2];
};

__device__ Raw LoadGroup(const std::byte* from, DType dtype, int64_t group, int count) {
  Raw raw = {};
  if (dtype == DType::kF32) {
    const auto* p = reinterpret_cast<const uint32_t*>(from) + group * kGroup;
    if (count == kGroup) {
      const ulonglong2 all = *reinterpret_cast<const ulonglong2*>(p);
      raw.words[0] = all.x;
      raw.words[1] = all.y;
    } else {
      for (int i = 0; i < count; ++i) raw.words[i / 2] |= static_cast<uint64_t>(p[i]) << (i % 2 * 32);
    }
    return raw;
  }
  const auto* p = reinterpret_cast<const uint16_t*>(from) + group * kGroup;
  if (count == kGroup) {
    raw.words[0] = *reinterpret_cast<const uint64_t*>(p);
  } else {
    for (int i = 0; i < count; ++i) raw.words[0] |= static_cast<uint64_t>(p[i]) << (i * 16);
  }
  return raw;
}

__device__ void Unpack(const Raw& raw, DType dtype, float (&v)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (dtype == DType::kF32) {
      v[i] = __uint_as_float(static_cast<uint32_t>(raw.words[i / 2] >> (i % 2 * 32)));
      continue;
    }
    const auto bits = static_cast<uint16_t>(raw.words[0] >> (i * 16));
    v[i] = dtype == DType::kBF16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                 : __half2float(__ushort_as_half(bits));
  }
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

struct Sums {
  uint64_t sent = 0, held = 0, non_finite = 0;
};

__device__ void StoreGroup(const StoreValuesParams& params, const Raw& raw, int64_t group, int count, Sums& sums) {
  float v[kGroup];
  Unpack(raw, params.sent, v);
  const uint64_t sent = WordSum(raw.words, params.sent, params.sent_index + group * kGroup, count);
  sums.sent += sent;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    sums.non_finite += !isfinite(v[i]);
    if (params.held == DType::kBF16) v[i] = __bfloat162float(__float2bfloat16_rn(v[i]));
  }
  uint64_t words[2];
  PackWords(v, params.held, words);
  // Most tensors are held as they were sent: one of the two sums will do.
  const bool same = params.sent == params.held && params.sent_index == params.held_index;
  sums.held += same ? sent : WordSum(words, params.held, params.held_index + group * kGroup, count);
  if (params.stored != params.held) PackWords(v, params.stored, words);
  if (params.to != nullptr) StoreWords(words, params.to, params.stored, group, count);
}

// Grid: at most kMaxBlocks, each thread kUnroll groups of 4 values in turn: their loads are under way together.
// Traffic: the values once as sent, once as stored. Sums of integers: their order does not show.
__global__ void __launch_bounds__(kThreads) StoreValuesKernel(const __grid_constant__ StoreValuesParams params) {
  const int64_t whole = params.count / kGroup;  // groups
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Sums sums;
  int64_t group = first;
  for (; group + (kUnroll - 1) * stride < whole; group += kUnroll * stride) {
    Raw raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) raw[u] = LoadGroup(params.from, params.sent, group + u * stride, kGroup);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) StoreGroup(params, raw[u], group + u * stride, kGroup, sums);
  }
  for (; group < whole; group += stride) {
    StoreGroup(params, LoadGroup(params.from, params.sent, group, kGroup), group, kGroup, sums);
  }
  const int rest = static_cast<int>(params.count % kGroup);
  if (first == 0 && rest > 0) {
    StoreGroup(params, LoadGroup(params.from, params.sent, whole, rest), whole, rest, sums);
  }
  if (params.tally == nullptr) return;
  sums.sent = WarpSum(sums.sent);
  sums.held = WarpSum(sums.held);
  sums.non_finite = WarpSum(sums.non_finite);
  if (threadIdx.x % 32 != 0) return;
  const auto add = [](uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  };
  add(&params.tally->sent_sum, sums.sent);
  add(&params.tally->held_sum, sums.held);
  if (sums.non_finite > 0) add(&params.tally->non_finite, sums.non_finite);
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
  absl::Status status = CheckPointer("StoreValuesParams.from", from, kGroup * DTypeBytes(sent));
  if (to != nullptr) status.Update(CheckPointer("StoreValuesParams.to", to, sizeof(uint64_t)));
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

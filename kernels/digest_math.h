// The arithmetic of weights_sync/digest.h, for the host and the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#if defined(__CUDACC__)
#define LOCKSTEP_HOST_DEVICE __host__ __device__
#else
#define LOCKSTEP_HOST_DEVICE
#endif

namespace lockstep {

inline constexpr uint64_t kDigestStride = 0x9E3779B97F4A7C15u;

LOCKSTEP_HOST_DEVICE inline uint64_t DigestMix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// What 64-bit word number `index`, from 0, adds to the sum.
LOCKSTEP_HOST_DEVICE inline uint64_t DigestTerm(uint64_t word, uint64_t index) {
  return DigestMix(word + (index + 1) * kDigestStride);
}

LOCKSTEP_HOST_DEVICE inline uint64_t DigestOfSum(uint64_t sum, uint64_t bytes) {
  return DigestMix(sum + bytes);
}

// The sum over a piece of a tensor that begins with its word `first_word`; only the tensor's last piece may end within
// a word. The sums of all pieces add up to the tensor's.
inline uint64_t DigestSum(std::span<const std::byte> piece, uint64_t first_word) {
  uint64_t sum = 0;
  for (size_t at = 0; at < piece.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, piece.data() + at, std::min<size_t>(8, piece.size() - at));
    sum += DigestTerm(word, first_word++);
  }
  return sum;
}

}  // namespace lockstep

#undef LOCKSTEP_HOST_DEVICE

// A tensor's digest: 64 bits that depend on every byte and its place. A sum of independent terms, so that any number of
// threads can compute it in any order; not cryptographic. docs/weights.md defines it for other languages;
// tests/data/digest_golden.json holds values.
//
// The bytes, padded with zeros to a multiple of 8, are little-endian 64-bit words w_i. With Mix(x): x ^= x >> 30, x *=
// 0xBF58476D1CE4E5B9, x ^= x >> 27, x *= 0x94D049BB133111EB, x ^= x >> 31 (the finaliser of SplitMix64, a bijection):
//
//   digest = Mix(sum_i Mix(w_i + (i + 1) * 0x9E3779B97F4A7C15) + number of bytes), modulo 2^64
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lockstep {

// Takes a tensor's bytes in pieces, in order.
class Digester {
 public:
  void Add(std::span<const std::byte> bytes);
  uint64_t Finish() const;

 private:
  uint64_t sum_ = 0;
  uint64_t words_ = 0;  // whole words added
  uint64_t bytes_ = 0;
  uint64_t partial_ = 0;  // the bytes of the word that is not whole yet
};

uint64_t Digest(std::span<const std::byte> bytes);

}  // namespace lockstep

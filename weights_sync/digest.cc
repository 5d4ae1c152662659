#include "weights_sync/digest.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace lockstep {
namespace {

static_assert(std::endian::native == std::endian::little, "words are little-endian");

constexpr uint64_t kStride = 0x9E3779B97F4A7C15u;

uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

void Digester::Add(std::span<const std::byte> bytes) {
  const uint64_t held = bytes_ % 8;
  bytes_ += bytes.size();
  if (held > 0) {
    const size_t take = std::min<size_t>(8 - held, bytes.size());
    std::memcpy(reinterpret_cast<std::byte*>(&partial_) + held, bytes.data(), take);
    bytes = bytes.subspan(take);
    if (held + take < 8) return;
    sum_ += Mix(partial_ + ++words_ * kStride);
    partial_ = 0;
  }
  const size_t whole = bytes.size() / 8;
  for (size_t i = 0; i < whole; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + i * 8, 8);
    sum_ += Mix(word + (words_ + i + 1) * kStride);
  }
  words_ += whole;
  // An empty span may have no data.
  if (bytes.size() % 8 != 0) std::memcpy(&partial_, bytes.data() + whole * 8, bytes.size() % 8);
}

uint64_t Digester::Finish() const {
  const uint64_t sum = bytes_ % 8 == 0 ? sum_ : sum_ + Mix(partial_ + (words_ + 1) * kStride);
  return Mix(sum + bytes_);
}

uint64_t Digest(std::span<const std::byte> bytes) {
  Digester digester;
  digester.Add(bytes);
  return digester.Finish();
}

}  // namespace lockstep

#include "weights_sync/digest.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/digest_math.h"

namespace lockstep {
namespace {

static_assert(std::endian::native == std::endian::little, "words are little-endian");

}  // namespace

void Digester::Add(std::span<const std::byte> bytes) {
  const uint64_t held = bytes_ % 8;
  bytes_ += bytes.size();
  if (held > 0) {
    const size_t take = std::min<size_t>(8 - held, bytes.size());
    std::memcpy(reinterpret_cast<std::byte*>(&partial_) + held, bytes.data(), take);
    bytes = bytes.subspan(take);
    if (held + take < 8) return;
    sum_ += DigestTerm(partial_, words_++);
    partial_ = 0;
  }
  const size_t whole = bytes.size() / 8;
  sum_ += DigestSum(bytes.first(whole * 8), words_);
  words_ += whole;
  // An empty span may have no data.
  if (bytes.size() % 8 != 0) std::memcpy(&partial_, bytes.data() + whole * 8, bytes.size() % 8);
}

uint64_t Digester::Finish() const {
  const uint64_t sum = bytes_ % 8 == 0 ? sum_ : sum_ + DigestTerm(partial_, words_);
  return DigestOfSum(sum, bytes_);
}

uint64_t Digest(std::span<const std::byte> bytes) {
  Digester digester;
  digester.Add(bytes);
  return digester.Finish();
}

}  // namespace lockstep

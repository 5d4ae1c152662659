// The ranking of tokens, as integers: a smaller key is a larger logit, or an equal logit and a lower id. Filters and
// lists of most probable tokens all use this one order, so that "ties by lowest id" is written once.
#pragma once

#include <bit>
#include <cstdint>

namespace lockstep {

using TokenKey = uint64_t;

// `logit` is not NaN. -0 and +0 are the same logit.
inline TokenKey MakeTokenKey(float logit, int32_t token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<TokenKey>(~ascending) << 32 | static_cast<uint32_t>(token);
}

inline int32_t KeyToken(TokenKey key) {
  return static_cast<int32_t>(static_cast<uint32_t>(key));
}

inline float KeyLogit(TokenKey key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>((ascending & 0x80000000u) != 0 ? ascending & 0x7FFFFFFFu : ~ascending);
}

}  // namespace lockstep

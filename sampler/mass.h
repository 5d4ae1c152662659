// Probability mass in fixed point. A token's weight e^(logit - max) is an fp32 number in [0, 1]; its mass is that
// weight rounded to a multiple of 2^-44 and counted in those units. Integer sums have one value in any order, on any
// vector width and any device, so nothing that is decided by a sum (where top_p cuts, which token a draw hits,
// log-sum-exp) depends on how the sum was taken. A weight under 2^-45 has no mass: such a token is never drawn.
#pragma once

#include <bit>
#include <cstdint>

namespace lockstep {

inline constexpr double kMassUnits = 0x1p44;                // mass of weight 1, that is of the most probable token
inline constexpr int64_t kMaxVocabSize = int64_t{1} << 18;  // total mass stays below 2^62

// Adding 2^52 rounds a double in [0, 2^51] to an integer, ties to even, and leaves it in the low mantissa bits.
inline constexpr double kRoundingMagic = 0x1p52;

inline uint64_t Mass(float weight) {
  return std::bit_cast<uint64_t>(static_cast<double>(weight) * kMassUnits + kRoundingMagic) -
         std::bit_cast<uint64_t>(kRoundingMagic);
}

}  // namespace lockstep

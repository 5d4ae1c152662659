// Conversions between fp32 and the 16-bit formats, one value at a time and bit for bit; the vector form of RoundBf16 is
// in cpu/simd_util-inl.h.
#pragma once

#include <bit>
#include <cstdint>

namespace lockstep {

// Nearest bf16, ties to even. Every NaN becomes the positive quiet NaN 0x7FC0, as in PyTorch.
inline uint16_t F32ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float Bf16ToF32(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

inline float RoundBf16(float value) {
  return Bf16ToF32(F32ToBf16(value));
}

// Exact: every fp16 value, subnormals included, is an fp32 value.
inline float F16ToF32(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 0x1Fu;
  const uint32_t mantissa = value & 0x3FFu;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace lockstep

// Tensor values in host memory, in the dtypes a checkpoint or a learner may hold them in: conversion and a look for
// what is not finite. Any alignment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/float_bits.h"
#include "kernels/numerics.h"

namespace lockstep {

// `count` values of `from` as values of `to` (kF32 or kBF16), to nearest and ties to even.
inline void ConvertValues(const std::byte* data, DType from, int64_t count, DType to, std::byte* out) {
  if (from == to) {
    if (count > 0) std::memcpy(out, data, count * DTypeBytes(to));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float value;
    if (from == DType::kF32) {
      std::memcpy(&value, data + i * sizeof(value), sizeof(value));
    } else {
      uint16_t bits;
      std::memcpy(&bits, data + i * sizeof(bits), sizeof(bits));
      value = from == DType::kBF16 ? Bf16ToF32(bits) : F16ToF32(bits);
    }
    if (to == DType::kF32) {
      std::memcpy(out + i * sizeof(value), &value, sizeof(value));
    } else {
      const uint16_t bits = F32ToBf16(value);
      std::memcpy(out + i * sizeof(bits), &bits, sizeof(bits));
    }
  }
}

namespace host_values_internal {

// All exponent bits are ones. Over integers: the compiler vectorises it.
template <class Word>
int64_t CountNonFinite(const std::byte* data, int64_t count, Word exponent) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    Word value;
    std::memcpy(&value, data + i * sizeof(value), sizeof(value));
    found += (value & exponent) == exponent;
  }
  return found;
}

}  // namespace host_values_internal

// NaNs and infinities.
inline int64_t CountNonFinite(const std::byte* data, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kF32:
      return host_values_internal::CountNonFinite<uint32_t>(data, count, 0x7F800000u);
    case DType::kBF16:
      return host_values_internal::CountNonFinite<uint16_t>(data, count, 0x7F80u);
    case DType::kF16:
      return host_values_internal::CountNonFinite<uint16_t>(data, count, 0x7C00u);
  }
  return 0;
}

}  // namespace lockstep

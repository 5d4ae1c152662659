// Reading a checkpoint's matrix as fp32, whatever it is stored as. Checkpoints may be mapped from files at any
// alignment.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/float_bits.h"
#include "kernels/ops.h"

namespace lockstep {

// to[i] = matrix[row][begin + i], i < count.
inline void ReadRow(const HostMatrix& matrix, int64_t row, int64_t begin, int64_t count, float* to) {
  const std::byte* from =
      static_cast<const std::byte*>(matrix.data) + (row * matrix.cols + begin) * DTypeBytes(matrix.dtype);
  if (matrix.dtype == DType::kF32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + i * sizeof(bits), sizeof(bits));
    to[i] = matrix.dtype == DType::kBF16 ? Bf16ToF32(bits) : F16ToF32(bits);
  }
}

}  // namespace lockstep

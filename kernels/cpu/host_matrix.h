// Reading a checkpoint's matrix as fp32, whatever it is stored as. Checkpoints may be mapped from files at any
// alignment.
#pragma once

#include <cstdint>

#include "kernels/host_values.h"
#include "kernels/ops.h"

namespace lockstep {

// to[i] = matrix[row][begin + i], i < count.
inline void ReadRow(const HostMatrix& matrix, int64_t row, int64_t begin, int64_t count, float* to) {
  const std::byte* from =
      static_cast<const std::byte*>(matrix.data) + (row * matrix.cols + begin) * DTypeBytes(matrix.dtype);
  ConvertValues(from, matrix.dtype, count, DType::kF32, reinterpret_cast<std::byte*>(to));
}

}  // namespace lockstep

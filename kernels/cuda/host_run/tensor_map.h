// Tensor maps on a CPU: what cuTensorMapEncodeTiled was told, kept in the map's own bytes.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace lockstep::host_run {

// A box of a tensor of three dimensions of bf16 with the 128-byte swizzle: what one copy brings.
struct TensorBox {
  const std::byte* base;
  std::array<int64_t, 3> sizes, at;
  std::array<int64_t, 2> strides;  // of dimensions 1 and 2, bytes
  std::array<int, 3> extent;

  size_t bytes() const { return size_t{2} * extent[0] * extent[1] * extent[2]; }
  // Elements outside of the tensor arrive as zeros.
  void CopyTo(std::byte* to) const;
};

TensorBox BoxOf(const CUtensorMap& map, std::array<int64_t, 3> at);

}  // namespace lockstep::host_run

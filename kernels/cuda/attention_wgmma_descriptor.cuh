// How wgmma is told where an operand lies in shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_ptx.cuh"

namespace lockstep::cuda {

// How an operand's lines are stored: the length of a line, and the descriptor's code for it.
enum class WgmmaSwizzle : uint64_t { k128Bytes = 1, k64Bytes = 2 };

// Descriptor of an operand in shared memory: atoms of 8 lines, one behind the other; `plane_step` bytes between planes
// of lines, for an operand whose inner dimension runs along the lines' order (else not used).
template <WgmmaSwizzle kSwizzle>
__device__ uint64_t WgmmaDescriptor(const void* data, uint32_t plane_step) {
  constexpr uint64_t kAtomBytes = 8 * (kSwizzle == WgmmaSwizzle::k128Bytes ? 128 : 64);
  return static_cast<uint64_t>((SharedAddress(data) & 0x3FFFF) >> 4) | static_cast<uint64_t>(plane_step >> 4) << 16 |
         (kAtomBytes >> 4) << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}

// The descriptor `bytes` further on.
__device__ inline uint64_t Advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace lockstep::cuda

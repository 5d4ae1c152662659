#include "kernels/cuda/host_run/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "kernels/cuda/host_run/host_run.h"

namespace lockstep::host_run {
namespace {

constexpr int kLine = 128, kChunk = 16;  // bytes: the swizzle's

struct Encoded {
  const void* base;
  uint64_t sizes[3], strides[2];
  uint32_t extent[3];
};
static_assert(sizeof(Encoded) <= sizeof(CUtensorMap));

CUresult Encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* extent, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const bool known = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 3 &&
                     std::all_of(steps, steps + 3, [](cuuint32_t step) { return step == 1; }) &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                     fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && extent[0] * 2 == kLine;
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  Encoded encoded = {.base = base, .sizes = {}, .strides = {}, .extent = {}};
  std::copy_n(sizes, 3, encoded.sizes);
  std::copy_n(strides, 2, encoded.strides);
  std::copy_n(extent, 3, encoded.extent);
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}

}  // namespace

TensorBox BoxOf(const CUtensorMap& map, std::array<int64_t, 3> at) {
  Encoded encoded;
  std::memcpy(&encoded, &map, sizeof(encoded));
  TensorBox box = {
      .base = static_cast<const std::byte*>(encoded.base), .sizes = {}, .at = at, .strides = {}, .extent = {}};
  std::copy_n(encoded.sizes, 3, box.sizes.begin());
  std::copy_n(encoded.strides, 2, box.strides.begin());
  std::copy_n(encoded.extent, 3, box.extent.begin());
  return box;
}

void TensorBox::CopyTo(std::byte* to) const {
  // The swizzle is one of addresses.
  Check(reinterpret_cast<uintptr_t>(to) % 1024 == 0, "a swizzled box at no multiple of 1,024 bytes");
  int line = 0;
  for (int64_t z = at[2]; z < at[2] + extent[2]; ++z) {
    for (int64_t y = at[1]; y < at[1] + extent[1]; ++y, ++line) {
      for (int chunk = 0; chunk < kLine / kChunk; ++chunk) {
        std::byte* chunk_to = to + line * kLine + ((chunk ^ (line & 7)) * kChunk);
        const int64_t x = at[0] + chunk * (kChunk / 2);
        if (z < 0 || z >= sizes[2] || y < 0 || y >= sizes[1] || x < 0 || x >= sizes[0]) {
          std::memset(chunk_to, 0, kChunk);
        } else {
          std::memcpy(chunk_to, base + z * strides[1] + y * strides[0] + 2 * x, kChunk);
        }
      }
    }
  }
}

}  // namespace lockstep::host_run

// The runtime's functions that host code of the kernels calls.

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&lockstep::host_run::Encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) {
  return "an error";
}

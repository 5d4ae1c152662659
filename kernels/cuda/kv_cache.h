// Paged keys and values of one attention layer, and the kernel that stores new rows into them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/batch.h"

namespace lockstep::cuda {

constexpr int64_t kKvHeadDim = 128;
// Keys and values are read in blocks of this many positions, so a page holds whole blocks.
constexpr int64_t kKvBlock = 64;
// Of a position in a head: 128 elements of 2 bytes.
constexpr int64_t kKvRowBytes = 256;
// A block has four planes of 32 dims each: a line of 64 bytes a position.
constexpr int64_t kKvPlanes = 4;
constexpr int64_t kKvLineBytes = kKvRowBytes / kKvPlanes;
constexpr int64_t kKvPlaneBytes = kKvBlock * kKvLineBytes;
constexpr int64_t kKvBlockBytes = kKvPlanes * kKvPlaneBytes;

// Where a head's keys (or values) have the 16 bytes of dims [8 chunk, 8 chunk + 8) of `position`: bytes from where the
// head begins in its page. A plane is stored as the 64-byte swizzle leaves it in shared memory, so that plain copies of
// whole planes bring what ldmatrix and wgmma read without bank conflicts: they run at the memory's rate, for a part of
// the head dimension too.
__host__ __device__ constexpr int64_t KvChunkOffset(int64_t position, int64_t chunk) {
  return position / kKvBlock * kKvBlockBytes + chunk / 4 * kKvPlaneBytes + position % kKvBlock * kKvLineBytes +
         (chunk % 4 ^ position / 2 % 4) * 16;
}

// Bytes of a page of one layer: keys, then values, each [kv_heads, page_size / 64] blocks.
constexpr int64_t KvPageBytes(int64_t kv_heads, int64_t page_size) {
  return 2 * kv_heads * page_size * kKvRowBytes;
}

struct KvPages {
  std::byte* base = nullptr;  // page p: base + p * page_bytes
  int64_t page_count = 0;
  int64_t page_bytes = 0;  // distance of pages: KvPageBytes() or more, a multiple of 256
  int64_t page_size = 0;   // positions; a multiple of 64
  int64_t kv_heads = 0;

  absl::Status Validate() const;
};

struct WriteKvParams {
  DeviceBatch batch;
  const __nv_bfloat16* k = nullptr;  // [rows, kv_heads * 128]
  const __nv_bfloat16* v = nullptr;  // [rows, kv_heads * 128]
  int64_t k_stride = 0;              // elements
  int64_t v_stride = 0;
  KvPages kv;

  absl::Status Validate() const;
};

// Stores every row's k and v at its position in its piece's pages; padding rows are skipped. Asynchronous on `stream`.
absl::Status LaunchWriteKv(const WriteKvParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

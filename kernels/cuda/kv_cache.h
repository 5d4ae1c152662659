// Paged keys and values of one attention layer, and the kernel that stores new rows into them.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/batch.h"

namespace lockstep::cuda {

constexpr int64_t kKvHeadDim = 128;
// Keys and values are read in blocks of this many positions, so a page holds whole blocks.
constexpr int64_t kKvBlock = 64;

// Bytes of a page of one layer: keys, then values, each [kv_heads, page_size, 128] bf16.
constexpr int64_t KvPageBytes(int64_t kv_heads, int64_t page_size) {
  return 2 * kv_heads * page_size * kKvHeadDim * static_cast<int64_t>(sizeof(__nv_bfloat16));
}

struct KvPages {
  std::byte* base = nullptr;  // page p: base + p * page_bytes
  int64_t page_count = 0;
  int64_t page_bytes = 0;  // distance of pages: KvPageBytes() or more, a multiple of 256
  int64_t page_size = 0;   // positions; a multiple of 64
  int64_t kv_heads = 0;

  absl::Status Validate() const;
};

// What one tensor copy brings of 64 positions of a head's keys or values.
enum class KvBox {
  kRows,      // all 128 elements, in memory's order: halves of a row follow each other; 128-byte swizzle
  kHalfRows,  // 64 elements of each row, one after the other; 128-byte swizzle
};

// The pages as a tensor [rows, 2 halves of a row, 64 elements], read in such boxes. Row of position i of kv
// head h in page p: p * (page_bytes / 256) + h * page_size + i % page_size, plus kv_heads * page_size for the value.
absl::StatusOr<CUtensorMap> KvTensorMap(const KvPages& pages, KvBox box);

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

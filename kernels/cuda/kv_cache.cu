#include "kernels/cuda/kv_cache.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bf16 elements of a 16-byte load
// Whole pages must start at the same offset of a 128-byte line, or a block costs one line more.
constexpr uintptr_t kBaseAlignment = 128;

// Grid: (rows, ceil(2 * kv_heads * 16 / 256)), 256 threads, a thread 16 bytes of k or v.
// Traffic: 4 bytes an element of k and v (read and written once).
__global__ void __launch_bounds__(kThreads) WriteKvKernel(const __grid_constant__ WriteKvParams params) {
  FollowPreviousKernel();
  const int row = static_cast<int>(blockIdx.x);
  const int piece_index = params.batch.row_piece[row];
  if (piece_index < 0) return;
  constexpr int kHeadVectors = kKvHeadDim / kVector;
  const int vectors = static_cast<int>(params.kv.kv_heads) * kHeadVectors;
  const int index = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (index >= 2 * vectors) return;
  const bool is_v = index >= vectors;
  const int column = (is_v ? index - vectors : index) * kVector;
  const int position = params.batch.positions[row];
  const int page_size = static_cast<int>(params.kv.page_size);
  const int page = params.batch.pages[params.batch.pieces[piece_index].page_begin + position / page_size];
  const __nv_bfloat16* from = (is_v ? params.v + row * params.v_stride : params.k + row * params.k_stride) + column;
  const int64_t head = column / kKvHeadDim + (is_v ? params.kv.kv_heads : 0);
  std::byte* to = params.kv.base + page * params.kv.page_bytes + head * page_size * kKvRowBytes +
                  KvChunkOffset(position % page_size, column % kKvHeadDim / kVector);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

}  // namespace

absl::Status KvPages::Validate() const {
  if (absl::Status status = CheckPointer("KvPages.base", base, kBaseAlignment); !status.ok()) return status;
  if (kv_heads <= 0 || kv_heads > 1024) return BadField("KvPages.kv_heads", kv_heads, "1 to 1024");
  if (page_size <= 0 || page_size % kKvBlock != 0 || page_size > 65536) {
    return BadField("KvPages.page_size", page_size, "a multiple of 64 from 64 to 65536");
  }
  if (page_bytes < KvPageBytes(kv_heads, page_size) || page_bytes % kKvRowBytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat("KvPages.page_bytes: ", page_bytes, ", want at least ",
                                                   KvPageBytes(kv_heads, page_size), " and a multiple of 256"));
  }
  if (page_count <= 0 || page_count > INT32_MAX / (page_bytes / kKvRowBytes)) {
    return BadField("KvPages.page_count", page_count, "1 or more, with page_count * page_bytes / 256 below 2^31");
  }
  return absl::OkStatus();
}

absl::Status WriteKvParams::Validate() const {
  if (batch.rows < 0) return BadField("WriteKvParams.batch.rows", batch.rows, "0 or more");
  if (absl::Status status = kv.Validate(); !status.ok()) return status;
  const int64_t width = kv.kv_heads * kKvHeadDim;
  if (absl::Status status = CheckPointer("WriteKvParams.k", k, sizeof(uint4)); !status.ok()) return status;
  if (absl::Status status = CheckPointer("WriteKvParams.v", v, sizeof(uint4)); !status.ok()) return status;
  if (absl::Status status = CheckStride("WriteKvParams.k_stride", k_stride, width, kVector); !status.ok())
    return status;
  if (absl::Status status = CheckStride("WriteKvParams.v_stride", v_stride, width, kVector); !status.ok())
    return status;
  const std::pair<const char*, const void*> arrays[] = {{"WriteKvParams.batch.pieces", batch.pieces},
                                                        {"WriteKvParams.batch.pages", batch.pages},
                                                        {"WriteKvParams.batch.positions", batch.positions},
                                                        {"WriteKvParams.batch.row_piece", batch.row_piece}};
  for (const auto& [field, pointer] : arrays) {
    if (absl::Status status = CheckPointer(field, pointer, sizeof(int32_t)); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status LaunchWriteKv(const WriteKvParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.batch.rows == 0) return absl::OkStatus();
  const int64_t vectors = 2 * params.kv.kv_heads * kKvHeadDim / kVector;
  const dim3 grid(static_cast<unsigned>(params.batch.rows), static_cast<unsigned>((vectors + kThreads - 1) / kThreads));
  return LaunchOverlapped("WriteKv", WriteKvKernel, grid, kThreads, stream, params);
}

}  // namespace lockstep::cuda

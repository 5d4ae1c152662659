// Tensor maps (host) and the instructions around them (device): bulk copies of a matrix's boxes into shared memory and
// the barriers they complete.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace lockstep::cuda {

// A view of a row-major bf16 matrix [rows, cols] as columns of boxes 64 elements wide, for copies of [boxes, box_rows,
// 64] into shared memory: rows of 128 bytes in the 128-byte swizzle, box after box. What lies outside of the matrix
// arrives as zeros. The map is a kernel's __grid_constant__ argument, so a captured launch keeps it.
// A pair is two such matrices, one behind the other in memory. A copy of it is [boxes, 2, box_rows, 64]: for each box
// rows of the first, then the same rows of the second.
struct TensorMapParams {
  const __nv_bfloat16* data = nullptr;  // 16-byte aligned
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements, a multiple of 8
  int box_rows = 0;    // 1 to 256
  int boxes = 0;       // of one copy; 1 if cols is no multiple of 64
  bool pair = false;   // for CopyPairedBoxes
};
absl::Status MakeTensorMap(const TensorMapParams& params, CUtensorMap* map);

constexpr int kTensorMapBoxCols = 64;

#if defined(__CUDACC__)

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// `arrivals` of threads complete a phase, together with the bytes announced.
__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to copies.
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void ArriveExpectBytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the phase with this parity is complete.
__device__ inline void WaitBarrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What a copied line is worth in L2.
enum class CachePolicy : uint64_t {
  kEvictFirst = 0x12F0000000000000,
  kEvictNormal = 0x1000000000000000,
};

// Boxes from column 64 * `box` + `col` and row `row` on; their bytes complete at `barrier`.
__device__ inline void CopyBoxes(uint32_t to, const CUtensorMap* map, int box, int row, int col, uint32_t barrier,
                                 CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(box), "r"(barrier), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// The same of a pair.
__device__ inline void CopyPairedBoxes(uint32_t to, const CUtensorMap* map, int box, int row, int col, uint32_t barrier,
                                       CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(0), "r"(box), "r"(barrier), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// Lets the stream's next kernel start, if it was launched to start early; it sees this kernel's results only after its
// own AwaitPreviousKernel.
__device__ inline void ReleaseNextKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the stream's previous kernel has ended and its results are visible. Without an early start it is no wait.
__device__ inline void AwaitPreviousKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

#endif  // __CUDACC__

}  // namespace lockstep::cuda

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;

using Vector = Bf16s<kVector>;  // the alignment of either dtype's accesses

// Grid: (rows), 128 threads, a block a row.
// Traffic: twice an element's bytes (read and written) and 4 bytes an index.
template <class T>
__global__ void __launch_bounds__(kThreads) GatherRowsKernel(const __grid_constant__ GatherRowsParams params) {
  FollowPreviousKernel();
  const int64_t row = blockIdx.x;
  const int64_t index = params.indices[row];
  if (index < 0 || index >= params.in_rows) __trap();
  const T* from = static_cast<const T*>(params.in) + index * params.in_stride;
  T* to = static_cast<T*>(params.out) + row * params.out_stride;
  for (int64_t i = threadIdx.x * kVector; i < params.width; i += kThreads * kVector)
    Store(Load<kVector>(from + i), to + i);
}

}  // namespace

absl::Status GatherRowsParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("GatherRowsParams.rows", rows, "0 to 2^31 - 1");
  if (in_rows <= 0 || in_rows > INT32_MAX) return BadField("GatherRowsParams.in_rows", in_rows, "1 to 2^31 - 1");
  if (width <= 0 || width % kVector != 0) return BadField("GatherRowsParams.width", width, "a multiple of 8");
  if (absl::Status status = CheckBf16OrF32("GatherRowsParams.dtype", dtype); !status.ok()) return status;
  absl::Status status = CheckPointer("GatherRowsParams.indices", indices, sizeof(*indices));
  status.Update(CheckPointer("GatherRowsParams.in", in, sizeof(Vector)));
  status.Update(CheckPointer("GatherRowsParams.out", out, sizeof(Vector)));
  status.Update(CheckStride("GatherRowsParams.in_stride", in_stride, width, kVector));
  status.Update(CheckStride("GatherRowsParams.out_stride", out_stride, width, kVector));
  return status;
}

absl::Status LaunchGatherRows(const GatherRowsParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const auto kernel = params.dtype == DType::kF32 ? GatherRowsKernel<float> : GatherRowsKernel<__nv_bfloat16>;
  return LaunchOverlapped("GatherRows", kernel, static_cast<unsigned>(params.rows), kThreads, stream, params);
}

}  // namespace lockstep::cuda

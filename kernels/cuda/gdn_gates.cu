#include "kernels/cuda/gdn_gates.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;

// Grid: (ceil(rows * heads / 128)), 128 threads, a thread one head of one row.
// Traffic: 10 bytes an element (a, b read; beta, g written): a launch's latency at any size that occurs.
__global__ void __launch_bounds__(kThreads) GdnGatesKernel(const __grid_constant__ GdnGatesParams params) {
  FollowPreviousKernel();
  GdnGate(params, blockIdx.x * kThreads + threadIdx.x);
}

absl::Status CheckColumns(const char* field, const char* stride_field, const void* pointer, uintptr_t size,
                          int64_t stride, int64_t heads) {
  if (absl::Status status = CheckPointer(field, pointer, size); !status.ok()) return status;
  return CheckStride(stride_field, stride, heads, 1);
}

}  // namespace

absl::Status GdnGatesParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("GdnGatesParams.rows", rows, "0 to 2^31 - 1");
  if (heads <= 0 || heads > 1024) return BadField("GdnGatesParams.heads", heads, "1 to 1024");
  if (rows * heads > INT32_MAX) return BadField("GdnGatesParams.rows", rows, "rows * heads below 2^31");
  absl::Status status = CheckColumns("GdnGatesParams.a", "GdnGatesParams.a_stride", a, sizeof(*a), a_stride, heads);
  status.Update(CheckColumns("GdnGatesParams.b", "GdnGatesParams.b_stride", b, sizeof(*b), b_stride, heads));
  status.Update(CheckPointer("GdnGatesParams.a_log", a_log, sizeof(*a_log)));
  status.Update(CheckPointer("GdnGatesParams.dt_bias", dt_bias, sizeof(*dt_bias)));
  status.Update(
      CheckColumns("GdnGatesParams.beta", "GdnGatesParams.beta_stride", beta, sizeof(*beta), beta_stride, heads));
  status.Update(CheckColumns("GdnGatesParams.g", "GdnGatesParams.g_stride", g, sizeof(*g), g_stride, heads));
  return status;
}

absl::Status LaunchGdnGates(const GdnGatesParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  const auto blocks = static_cast<unsigned>((params.rows * params.heads + kThreads - 1) / kThreads);
  return LaunchOverlapped("GdnGates", GdnGatesKernel, blocks, kThreads, stream, params);
}

}  // namespace lockstep::cuda

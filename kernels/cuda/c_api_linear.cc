#include <cstdint>

#include "kernels/cuda/c_api.h"
#include "kernels/cuda/linear.h"

namespace {

lockstep::cuda::LinearParams Params(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride,
                                    int fp32, int64_t m, int64_t n, int64_t k, int early_start) {
  using namespace lockstep::cuda;
  return {.x = static_cast<const __nv_bfloat16*>(x),
          .weight = static_cast<const __nv_bfloat16*>(weight),
          .out = out,
          .out_dtype = fp32 != 0 ? LinearOutput::kFp32 : LinearOutput::kBf16,
          .m = m,
          .n = n,
          .k = k,
          .x_stride = x_stride,
          .out_stride = out_stride,
          .early_start = early_start != 0};
}

}  // namespace

// out[m, n] = x[m, k] * weight[n, k]^T; strides in elements; fp32 != 0: an fp32 output.
extern "C" int lockstep_linear(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride,
                               int fp32, int64_t m, int64_t n, int64_t k, int early_start, void* stream) {
  using namespace lockstep::cuda;
  return CApiResult(LaunchLinear(Params(x, x_stride, weight, out, out_stride, fp32, m, n, k, early_start),
                                 static_cast<cudaStream_t>(stream)));
}

// out[m, n] = silu(gate) * up, of gate | up = x * weight[2n, k]^T, in the bits of lockstep_linear and lockstep_swiglu.
extern "C" int lockstep_linear_swiglu(const void* x, int64_t x_stride, const void* weight, void* out,
                                      int64_t out_stride, int64_t m, int64_t n, int64_t k, int early_start,
                                      void* stream) {
  using namespace lockstep::cuda;
  LinearParams params = Params(x, x_stride, weight, out, out_stride, /*fp32=*/0, m, n, k, early_start);
  params.fusion = LinearFusion::kSwiGlu;
  return CApiResult(LaunchLinear(params, static_cast<cudaStream_t>(stream)));
}

// The same as lockstep_linear with the tile given.
extern "C" int lockstep_linear_tile(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride,
                                    int fp32, int64_t m, int64_t n, int64_t k, int early_start, int warpgroups,
                                    int blocks, int features, void* stream) {
  using namespace lockstep::cuda;
  const LinearTile tile = {.warpgroups = warpgroups, .blocks = blocks, .features = features};
  return CApiResult(LaunchLinear(Params(x, x_stride, weight, out, out_stride, fp32, m, n, k, early_start), tile,
                                 static_cast<cudaStream_t>(stream)));
}

#include <algorithm>

#include "kernels/cuda/linear.h"
#include "kernels/cuda/linear_kernel.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/tma.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kVector = 8;  // elements whose bytes are 16: what a copy's rows are aligned to

absl::Status CudaStatus(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cudaGetErrorString(error)));
}

absl::StatusOr<int> Multiprocessors() {
  int device = 0;
  if (absl::Status status = CudaStatus("cudaGetDevice", cudaGetDevice(&device)); !status.ok()) return status;
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (absl::Status status = CudaStatus("cudaDeviceGetAttribute", error); !status.ok()) return status;
  return count;
}

LinearKernel FindLinearKernel(LinearFusion fusion, const LinearTile& tile) {
  if (fusion == LinearFusion::kSwiGlu) return FindLinearSwiGluKernel(tile);
  if (tile.warpgroups == 1) return FindLinearKernel1x1(tile.features);
  return tile.blocks == 1 ? FindLinearKernel2x1(tile.features) : FindLinearKernel2x2(tile.features);
}

absl::Status Launch(const LinearParams& params, const LinearPlan& plan, cudaStream_t stream) {
  const LinearTile& tile = plan.tile;
  LinearKernelArgs args;
  // Boxes follow each other in whole groups of 8 rows; one copy takes several only if it fills them.
  const int boxes = LinearStageBoxes(tile.tokens(), tile.features);
  const bool whole_boxes = params.k % kTensorMapBoxCols == 0;
  const int x_rows = static_cast<int>(std::min<int64_t>(tile.tokens(), params.m));
  const bool pair = params.fusion == LinearFusion::kSwiGlu;
  const int outputs = tile.outputs(params.fusion);
  const int weight_rows = pair ? outputs : static_cast<int>(std::min<int64_t>(outputs, params.n));
  args.x_boxes = whole_boxes && x_rows == plan.x_rows ? boxes : 1;
  args.weight_boxes = whole_boxes && weight_rows == outputs ? boxes : 1;
  const TensorMapParams x = {.data = params.x,
                             .rows = params.m,
                             .cols = params.k,
                             .stride = params.x_stride,
                             .box_rows = x_rows,
                             .boxes = args.x_boxes};
  if (absl::Status status = MakeTensorMap(x, &args.x); !status.ok()) return status;
  const TensorMapParams weight = {.data = params.weight,
                                  .rows = params.n,
                                  .cols = params.k,
                                  .stride = params.k,
                                  .box_rows = weight_rows,
                                  .boxes = args.weight_boxes,
                                  .pair = pair};
  if (absl::Status status = MakeTensorMap(weight, &args.weight); !status.ok()) return status;
  args.out = params.out;
  args.out_stride = params.out_stride;
  args.m = static_cast<int>(params.m);
  args.n = static_cast<int>(params.n);
  args.k = static_cast<int>(params.k);
  args.fp32 = params.out_dtype == LinearOutput::kFp32;
  args.x_rows = plan.x_rows;
  args.stages = plan.stages;
  args.token_tiles = static_cast<int>(plan.token_tiles);
  args.feature_tiles = static_cast<int>(plan.feature_tiles);
  args.group_tokens = static_cast<int>(plan.group_tokens);

  const LinearKernel kernel = FindLinearKernel(params.fusion, tile);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
  if (absl::Status status = CudaStatus("cudaFuncSetAttribute", error); !status.ok()) return status;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.thread_blocks));
  config.blockDim = dim3(static_cast<unsigned>(LinearThreads(tile.warpgroups)));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  // Blocks that start early are spread over the device in any order; neighbours that share weights must not be.
  config.numAttrs = params.early_start && plan.token_tiles == 1 ? 1 : 0;
  return CudaStatus("Linear", cudaLaunchKernelEx(&config, kernel, args));
}

LinearShape ShapeOf(const LinearParams& params) {
  return {.m = params.m, .n = params.n, .k = params.k, .fusion = params.fusion};
}

}  // namespace

absl::Status LinearParams::Validate() const {
  if (m < 0 || m > INT32_MAX / 2) return BadField("LinearParams.m", m, "0 to 2^30 - 1");
  if (n <= 0 || n > INT32_MAX / 2 || n % kVector != 0) return BadField("LinearParams.n", n, "a multiple of 8");
  if (k <= 0 || k > INT32_MAX / 2 || k % kLinearInputMultiple != 0)
    return BadField("LinearParams.k", k, "a multiple of 16");
  if (fusion == LinearFusion::kSwiGlu && out_dtype != LinearOutput::kBf16) {
    return BadField("LinearParams.out_dtype", "kFp32", "kBf16 with LinearFusion::kSwiGlu");
  }
  if (absl::Status status = CheckPointer("LinearParams.x", x, 16); !status.ok()) return status;
  if (absl::Status status = CheckPointer("LinearParams.weight", weight, 16); !status.ok()) return status;
  if (absl::Status status = CheckPointer("LinearParams.out", out, 16); !status.ok()) return status;
  if (absl::Status status = CheckStride("LinearParams.x_stride", x_stride, k, kVector); !status.ok()) return status;
  return CheckStride("LinearParams.out_stride", out_stride, n, kVector);
}

absl::Status LaunchLinear(const LinearParams& params, const LinearTile& tile, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.m == 0) return absl::OkStatus();
  const absl::StatusOr<int> multiprocessors = Multiprocessors();
  if (!multiprocessors.ok()) return multiprocessors.status();
  const absl::StatusOr<LinearPlan> plan = PlanLinear(ShapeOf(params), tile, *multiprocessors);
  if (!plan.ok()) return plan.status();
  return Launch(params, *plan, stream);
}

absl::Status LaunchLinear(const LinearParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.m == 0) return absl::OkStatus();
  const absl::StatusOr<int> multiprocessors = Multiprocessors();
  if (!multiprocessors.ok()) return multiprocessors.status();
  const LinearShape shape = ShapeOf(params);
  const absl::StatusOr<LinearPlan> plan =
      PlanLinear(shape, ChooseLinearTile(shape, *multiprocessors), *multiprocessors);
  if (!plan.ok()) return plan.status();
  return Launch(params, *plan, stream);
}

}  // namespace lockstep::cuda

#include "kernels/cuda/tma.h"

#include <cudaTypedefs.h>

#include "absl/strings/str_cat.h"

namespace lockstep::cuda {
namespace {

// From the driver that is loaded already, so that nothing links against it.
PFN_cuTensorMapEncodeTiled_v12000 EncodeFunction() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

absl::Status MakeTensorMap(const TensorMapParams& params, CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = EncodeFunction();
  if (encode == nullptr) return absl::UnavailableError("cuTensorMapEncodeTiled: not in this driver");
  // A width that is no multiple of 64 is one column of boxes that begin anywhere, so that its end is the matrix's.
  const bool whole = params.cols % kTensorMapBoxCols == 0;
  const auto rows = static_cast<cuuint64_t>(params.rows);
  const auto cols = static_cast<cuuint64_t>(params.cols);
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(params.stride) * sizeof(__nv_bfloat16);
  const cuuint64_t box_bytes = kTensorMapBoxCols * sizeof(__nv_bfloat16);
  const cuuint64_t columns = whole ? cols / kTensorMapBoxCols : 1;
  const auto box_rows = static_cast<cuuint32_t>(params.box_rows);
  const auto boxes = static_cast<cuuint32_t>(params.boxes);
  cuuint64_t sizes[] = {whole ? kTensorMapBoxCols : cols, rows, columns, 1};
  cuuint64_t strides[] = {row_bytes, box_bytes, 0};
  cuuint32_t box[] = {kTensorMapBoxCols, box_rows, boxes, 1};
  if (params.pair) {  // the two matrices' dimension comes before the boxes'
    sizes[2] = 2;
    sizes[3] = columns;
    strides[1] = rows * row_bytes;
    strides[2] = box_bytes;
    box[2] = 2;
    box[3] = boxes;
  }
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, params.pair ? 4 : 3, const_cast<__nv_bfloat16*>(params.data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for [",
                                          params.rows, ", ", params.cols, "] of stride ", params.stride, ", boxes ",
                                          params.boxes, " of ", params.box_rows, params.pair ? ", a pair" : ""));
}

}  // namespace lockstep::cuda

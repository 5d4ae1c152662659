// The instructions of kernels/cuda/bf16_rows_ptx.cuh on a CPU.
#pragma once

#include <cstdint>

#include "kernels/oracle/row_ops.h"
#include "kernels/oracle/special_functions.h"

namespace lockstep::cuda {

inline uint32_t PackWord(float first, float second) {
  return static_cast<uint32_t>(oracle::ToBf16(first)) | static_cast<uint32_t>(oracle::ToBf16(second)) << 16;
}

inline float Exp2ApproxFtz(float x) {
  return oracle::Exp2Approx(x);
}
inline float ReciprocalApprox(float x) {
  return oracle::ReciprocalApprox(x);
}
// Subnormal results are zero here: all the same to TritonSigmoid, which adds one.
inline float Exp2Approx(float x) {
  return oracle::Exp2Approx(x);
}
inline float DivideFull(float x, float y) {
  return oracle::DivFull(x, y);
}
inline float SqrtApprox(float x) {
  return oracle::SqrtApprox(x);
}

}  // namespace lockstep::cuda

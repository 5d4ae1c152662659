// Fields that several calls of lockstep.v1.Weights have, as their server and tools/weights_sender read and write them.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/numerics.h"
#include "lockstep/v1/rollout.pb.h"
#include "lockstep/v1/weights.pb.h"
#include "weights_sync/version.h"

namespace lockstep {

inline absl::StatusOr<WeightVersion> VersionOf(bool has, const v1::WeightVersion& version) {
  if (!has) return absl::InvalidArgumentError("version: unset; want the epoch and step of the update");
  if (version.epoch() < 0 || version.step() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("version: (", version.epoch(), ", ", version.step(), "); want an epoch and a step of 0 or more"));
  }
  return WeightVersion{version.epoch(), version.step()};
}

inline v1::TensorDType ProtoDType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::TENSOR_DTYPE_FLOAT32;
    case DType::kBF16:
      return v1::TENSOR_DTYPE_BFLOAT16;
    case DType::kF16:
      return v1::TENSOR_DTYPE_FLOAT16;
  }
  return v1::TENSOR_DTYPE_UNSPECIFIED;
}

}  // namespace lockstep

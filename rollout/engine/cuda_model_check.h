// Whether a model has shapes that the CUDA kernels are compiled for.
#pragma once

#include "absl/status/status.h"
#include "rollout/model/spec.h"

namespace lockstep {

// INVALID_ARGUMENT naming config.json's field, its value and what there is. Needs no GPU.
absl::Status CheckCudaModel(const ModelSpec& spec);

}  // namespace lockstep

// The CUDA backend: kernels/cuda on one GPU.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "rollout/engine/backend.h"

namespace lockstep {

// FAILED_PRECONDITION, saying what is there and what is needed: no GPU, another architecture, an old driver.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options, const NumericsProfile& profile,
                                                         ThreadPool* threads);

}  // namespace lockstep

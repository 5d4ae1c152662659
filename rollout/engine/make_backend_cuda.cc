// MakeBackend of a build with CUDA.
#include "absl/strings/str_cat.h"
#include "rollout/engine/backend.h"
#include "rollout/engine/cuda_backend.h"

namespace lockstep {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options, const NumericsProfile& profile,
                                                     ThreadPool* threads) {
  if (options.name == "cpu") return MakeCpuBackend(profile, threads);
  if (options.name == "cuda") return MakeCudaBackend(options, profile, threads);
  return absl::InvalidArgumentError(
      absl::StrCat("--backend: value \"", options.name, "\" is unknown; want \"cpu\" or \"cuda\""));
}

}  // namespace lockstep

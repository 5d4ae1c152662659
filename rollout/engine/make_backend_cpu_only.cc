// MakeBackend of a build without CUDA.
#include "absl/strings/str_cat.h"
#include "rollout/engine/backend.h"

namespace lockstep {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options, const NumericsProfile& profile,
                                                     ThreadPool* threads) {
  if (options.name == "cpu") return MakeCpuBackend(profile, threads);
  if (options.name == "cuda") {
    return absl::UnimplementedError(
        "--backend: value \"cuda\": this build has no CUDA backend; want \"cpu\", or a build of the preset \"cuda\"");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--backend: value \"", options.name, "\" is unknown; want \"cpu\" or \"cuda\""));
}

}  // namespace lockstep

// CUPTI, found at run time. Without it the benchmark leaves out its profiles.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "tools/bench/cupti_abi.h"

namespace lockstep {

struct CuptiLibrary {
  cupti::Api api;
  std::string path;  // as it was found

  // path: empty for libcupti of the loader's search path, else of the folders of a CUDA toolkit ($CUDA_HOME,
  // /usr/local/cuda). NOT_FOUND, with where it was looked for. FAILED_PRECONDITION: it lacks a symbol or is older than
  // CUDA 12's. It stays loaded for good: CUPTI's hooks into the driver do.
  static absl::StatusOr<CuptiLibrary> Load(const std::string& path);

  // OK for kSuccess. `what`: the call that failed.
  absl::Status ToStatus(cupti::Result result, const char* what) const;
};

}  // namespace lockstep

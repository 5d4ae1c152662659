#include "tools/bench/cupti_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rollout/base/resolve_symbol.h"

namespace lockstep {
namespace {

constexpr const char* kWanted =
    "libcupti.so of CUDA 12 or newer; --cupti_library names it, --profile=false does without";

std::vector<std::string> Candidates(const std::string& path) {
  if (!path.empty()) return {path};
  std::vector<std::string> found = {"libcupti.so", "libcupti.so.13", "libcupti.so.12"};
  std::vector<std::string> toolkits;
  if (const char* home = std::getenv("CUDA_HOME"); home != nullptr && *home != '\0') toolkits.push_back(home);
  toolkits.push_back("/usr/local/cuda");
  for (const std::string& toolkit : toolkits) {
    for (const char* folder : {"extras/CUPTI/lib64", "targets/x86_64-linux/lib", "lib64", "lib"})
      found.push_back(absl::StrCat(toolkit, "/", folder, "/libcupti.so"));
  }
  return found;
}

}  // namespace

absl::StatusOr<CuptiLibrary> CuptiLibrary::Load(const std::string& path) {
  const std::vector<std::string> candidates = Candidates(path);
  void* handle = nullptr;
  CuptiLibrary library = {};
  for (const std::string& candidate : candidates) {
    handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    library.path = candidate;
    if (handle != nullptr) break;
  }
  if (handle == nullptr) {
    // Of one that is named, why; of many, where they were looked for.
    const char* error = path.empty() ? nullptr : dlerror();
    return absl::NotFoundError(absl::StrCat("cannot load ", absl::StrJoin(candidates, ", "),
                                            error == nullptr ? "" : ": ", error == nullptr ? "" : error, "; want ",
                                            kWanted));
  }
  absl::Status status;
#define LOCKSTEP_RESOLVE(name) \
  if (status.ok()) status = ResolveSymbol(handle, library.path, #name, kWanted, library.api.name)
  LOCKSTEP_RESOLVE(cuptiGetVersion);
  LOCKSTEP_RESOLVE(cuptiGetResultString);
  LOCKSTEP_RESOLVE(cuptiActivityRegisterCallbacks);
  LOCKSTEP_RESOLVE(cuptiActivityEnable);
  LOCKSTEP_RESOLVE(cuptiActivityDisable);
  LOCKSTEP_RESOLVE(cuptiActivityFlushAll);
  LOCKSTEP_RESOLVE(cuptiActivityGetNextRecord);
  LOCKSTEP_RESOLVE(cuptiActivityGetNumDroppedRecords);
#undef LOCKSTEP_RESOLVE
  if (!status.ok()) return status;
  uint32_t version = 0;
  status = library.ToStatus(library.api.cuptiGetVersion(&version), "cuptiGetVersion");
  if (!status.ok()) return status;
  if (version < cupti::kMinVersion) {
    return absl::FailedPreconditionError(absl::StrCat(library.path, ": CUPTI API version ", version, ", want at least ",
                                                      cupti::kMinVersion, ": ", kWanted));
  }
  return library;
}

absl::Status CuptiLibrary::ToStatus(cupti::Result result, const char* what) const {
  if (result == cupti::kSuccess) return absl::OkStatus();
  const char* text = nullptr;
  api.cuptiGetResultString(result, &text);
  return absl::InternalError(
      absl::StrCat(what, ": ", text == nullptr ? "no text" : text, " (", static_cast<int>(result), ")"));
}

}  // namespace lockstep

// A function of a library that was loaded at run time.
#pragma once

#include <dlfcn.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

// FAILED_PRECONDITION if the library at `path` has no such symbol; `wanted` says which library would have.
template <typename Function>
absl::Status ResolveSymbol(void* handle, const std::string& path, const char* symbol, const char* wanted,
                           Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(handle, symbol));
  if (function != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(path, " has no symbol ", symbol, "; want ", wanted));
}

}  // namespace lockstep

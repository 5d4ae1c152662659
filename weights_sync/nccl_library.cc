#include "weights_sync/nccl_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "rollout/base/resolve_symbol.h"

namespace lockstep {
namespace {

constexpr const char* kWanted = "libnccl.so.2 of NCCL 2.18 or newer";

const char* Name(nccl::Result result) {
  switch (result) {
    case nccl::kSuccess:
      return "ncclSuccess";
    case nccl::kUnhandledCudaError:
      return "ncclUnhandledCudaError";
    case nccl::kSystemError:
      return "ncclSystemError";
    case nccl::kInternalError:
      return "ncclInternalError";
    case nccl::kInvalidArgument:
      return "ncclInvalidArgument";
    case nccl::kInvalidUsage:
      return "ncclInvalidUsage";
    case nccl::kRemoteError:
      return "ncclRemoteError";
    case nccl::kInProgress:
      return "ncclInProgress";
  }
  return "unknown result";
}

}  // namespace

std::string NcclVersionName(int version) {
  // Up to 2.8 the minor version had one digit less before it.
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int minor = version < 10000 ? version % 1000 / 100 : version % 10000 / 100;
  return absl::StrCat(major, ".", minor, ".", version % 100);
}

absl::StatusOr<std::shared_ptr<NcclLibrary>> NcclLibrary::Load(const std::string& path) {
  const std::string file = path.empty() ? "libnccl.so.2" : path;
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* error = dlerror();
    return absl::NotFoundError(
        absl::StrCat("cannot load ", file, ": ", error == nullptr ? "no reason given" : error, "; want ", kWanted));
  }
  nccl::Api api = {};
  absl::Status status;
#define LOCKSTEP_RESOLVE(name) \
  if (status.ok()) status = ResolveSymbol(handle, file, #name, kWanted, api.name)
  LOCKSTEP_RESOLVE(ncclGetVersion);
  LOCKSTEP_RESOLVE(ncclGetUniqueId);
  LOCKSTEP_RESOLVE(ncclCommInitRankConfig);
  LOCKSTEP_RESOLVE(ncclCommGetAsyncError);
  LOCKSTEP_RESOLVE(ncclBroadcast);
  LOCKSTEP_RESOLVE(ncclGroupStart);
  LOCKSTEP_RESOLVE(ncclGroupEnd);
  LOCKSTEP_RESOLVE(ncclCommFinalize);
  LOCKSTEP_RESOLVE(ncclCommDestroy);
  LOCKSTEP_RESOLVE(ncclCommAbort);
  LOCKSTEP_RESOLVE(ncclGetErrorString);
#undef LOCKSTEP_RESOLVE
  // The version first: of an old library it says more than the symbol which that one lacks.
  int version = 0;
  if (api.ncclGetVersion != nullptr && api.ncclGetVersion(&version) == nccl::kSuccess && version < nccl::kMinVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(file, ": NCCL version ", NcclVersionName(version), "; want 2.18 or newer"));
  }
  if (!status.ok()) return status;
  if (version == 0) return absl::FailedPreconditionError(absl::StrCat(file, ": ncclGetVersion failed"));
  static_cast<void>(ResolveSymbol(handle, file, "ncclGetLastError", kWanted, api.ncclGetLastError));  // optional
  return std::shared_ptr<NcclLibrary>(new NcclLibrary(api, version));
}

absl::StatusOr<std::string> NcclLibrary::UniqueId() const {
  nccl::UniqueId id = {};
  const absl::Status status = ToStatus(api_.ncclGetUniqueId(&id), "ncclGetUniqueId");
  if (!status.ok()) return status;
  return std::string(id.internal, sizeof(id.internal));
}

absl::Status NcclLibrary::ToStatus(nccl::Result result, const std::string& what) const {
  if (result == nccl::kSuccess) return absl::OkStatus();
  const char* text = api_.ncclGetErrorString(result);
  const char* last = api_.ncclGetLastError == nullptr ? nullptr : api_.ncclGetLastError(nullptr);
  std::string message =
      absl::StrCat(what, ": ", Name(result), " (", static_cast<int>(result), "): ", text == nullptr ? "no text" : text);
  if (last != nullptr && *last != '\0') absl::StrAppend(&message, "; NCCL's last error: ", last);
  switch (result) {
    case nccl::kSystemError:
    case nccl::kRemoteError:
      return absl::UnavailableError(message);
    case nccl::kInvalidArgument:
    case nccl::kInvalidUsage:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace lockstep

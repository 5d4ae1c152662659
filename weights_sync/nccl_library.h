// NCCL, found at run time. A worker without it serves all the same.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "weights_sync/nccl_abi.h"

namespace lockstep {

// Thread-safe.
class NcclLibrary {
 public:
  // path: empty for libnccl.so.2 of the loader's search path. NOT_FOUND: no such library. FAILED_PRECONDITION: it lacks
  // a symbol or is older than 2.18. It stays loaded for good: NCCL leaves threads behind that run its code.
  static absl::StatusOr<std::shared_ptr<NcclLibrary>> Load(const std::string& path);

  // 128 bytes for all ranks of one communicator; whoever makes them must live until all have come.
  absl::StatusOr<std::string> UniqueId() const;

  const nccl::Api& api() const { return api_; }
  int version() const { return version_; }  // 2.18.3: 21803
  // OK for kSuccess. `what`: the call or the operation that failed.
  absl::Status ToStatus(nccl::Result result, const std::string& what) const;

 private:
  explicit NcclLibrary(const nccl::Api& api, int version) : api_(api), version_(version) {}

  const nccl::Api api_;
  const int version_;
};

// "2.18.3"
std::string NcclVersionName(int version);

}  // namespace lockstep

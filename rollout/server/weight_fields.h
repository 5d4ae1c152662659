// Fields that several calls of lockstep.v1.Weights have.
#pragma once

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "lockstep/v1/rollout.pb.h"
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

}  // namespace lockstep

// A version of the weights.
#pragma once

#include <compare>
#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace lockstep {

// Ordered by the learner's run, then its optimiser step. A freshly loaded checkpoint is (0, 0).
struct WeightVersion {
  int64_t epoch = 0;
  int64_t step = 0;
  auto operator<=>(const WeightVersion&) const = default;
};

inline std::string VersionText(const WeightVersion& version) {
  return absl::StrCat("(", version.epoch, ", ", version.step, ")");
}

}  // namespace lockstep

// Shapes of named tensors: how they read in messages, and which cut into parts they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace lockstep {

// "[3840, 1, 4]"
inline std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Of `cuts`, at least one, each a tensor's rows by part: the one that fits parts of these row counts, or else the
// first, to complain with.
inline const std::vector<int64_t>& FittingCut(const std::vector<std::vector<int64_t>>& cuts,
                                              const std::vector<int64_t>& rows) {
  const auto found = std::find(cuts.begin(), cuts.end(), rows);
  return found == cuts.end() ? cuts.front() : *found;
}

}  // namespace lockstep

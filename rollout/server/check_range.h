// One check that both planes make of their requests' integers.
#pragma once

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

// INVALID_ARGUMENT "FIELD: value V; want LOW to HIGH", or OK.
inline absl::Status CheckRange(std::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(std::string(field), ": value ", value, "; want ", low, " to ", high));
}

}  // namespace lockstep

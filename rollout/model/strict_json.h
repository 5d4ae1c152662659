// JSON from files that others wrote. nlohmann keeps the last of two equal keys and nests without limit; here both are
// errors.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lockstep {

inline constexpr int kMaxJsonDepth = 32;

// INVALID_ARGUMENT "<what>: ..." for a syntax error, text that is not UTF-8, a duplicate key (named), or nesting deeper
// than kMaxJsonDepth.
absl::StatusOr<nlohmann::json> ParseStrictJson(std::string_view text, std::string_view what);

// A value for an error message: JSON text, cut after 80 bytes.
std::string JsonPreview(const nlohmann::json& value);

}  // namespace lockstep

// Status helpers. Recoverable errors are absl::Status and say what was wrong, the value seen and the value wanted;
// broken invariants are LOCKSTEP_CHECK.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define LOCKSTEP_STATUS_CONCAT_INNER(a, b) a##b
#define LOCKSTEP_STATUS_CONCAT(a, b) LOCKSTEP_STATUS_CONCAT_INNER(a, b)

#define LOCKSTEP_RETURN_IF_ERROR(expr)                                                        \
  do {                                                                                        \
    if (absl::Status lockstep_status = (expr); !lockstep_status.ok()) return lockstep_status; \
  } while (false)

// `lhs` is a declaration or an lvalue, so it cannot stand in parentheses.
// NOLINTBEGIN(bugprone-macro-parentheses)
#define LOCKSTEP_ASSIGN_OR_RETURN(lhs, expr) \
  LOCKSTEP_ASSIGN_OR_RETURN_IMPL(LOCKSTEP_STATUS_CONCAT(lockstep_statusor_, __LINE__), lhs, expr)
#define LOCKSTEP_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                   \
  if (!tmp.ok()) return std::move(tmp).status();       \
  lhs = *std::move(tmp)
// NOLINTEND(bugprone-macro-parentheses)

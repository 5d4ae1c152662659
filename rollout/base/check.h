// LOCKSTEP_CHECK(condition, "format", args...): an invariant. When it does not hold the program logs where and why, and
// aborts: a worker with a broken invariant must not go on computing log-probabilities.
#pragma once

#include <cstdlib>

#include "spdlog/spdlog.h"

#define LOCKSTEP_CHECK(condition, ...)                                               \
  do {                                                                               \
    if (!(condition)) [[unlikely]] {                                                 \
      ::spdlog::critical("{}:{}: check failed: {}", __FILE__, __LINE__, #condition); \
      ::spdlog::critical(__VA_ARGS__);                                               \
      ::spdlog::shutdown();                                                          \
      ::std::abort();                                                                \
    }                                                                                \
  } while (false)

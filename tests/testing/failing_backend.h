// A CPU backend whose device fails: after a number of steps, every step ends with an error.
#pragma once

#include <memory>

#include "rollout/engine/backend.h"

namespace lockstep {

// `steps`: that succeed first. `threads` must outlive it.
std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps);

// What the failed steps report.
inline constexpr char kDeviceFailure[] = "GdnDecode: an illegal memory access was encountered";

}  // namespace lockstep

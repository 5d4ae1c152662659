// CPU backends whose device fails.
#pragma once

#include <memory>

#include "rollout/engine/backend.h"

namespace lockstep {

// `steps`: that succeed; those after end with an error. `threads` must outlive it.
std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps);

// Steps fail on a thread that is neither the maker's nor has called Ops::UseOnThisThread.
std::unique_ptr<Backend> MakeThreadBoundBackend(const NumericsProfile& profile, ThreadPool* threads);

// What the failed steps report.
inline constexpr char kOtherThread[] = "BeginStep: the device is not this thread's";
inline constexpr char kDeviceFailure[] = "GdnDecode: an illegal memory access was encountered";

}  // namespace lockstep

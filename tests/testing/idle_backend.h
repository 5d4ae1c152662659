// A device that computes nothing, at once: what remains of a step is the host's. Every sample draws token 1 with
// log-probability 0.
#pragma once

#include <memory>

#include "rollout/engine/backend.h"

namespace lockstep {

// `threads` must outlive it.
std::unique_ptr<Backend> MakeIdleBackend(const NumericsProfile& profile, ThreadPool* threads);

}  // namespace lockstep

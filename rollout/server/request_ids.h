// What a request leaves to the worker to choose.
#pragma once

#include "rollout/server/convert.h"

namespace lockstep {

// A random (version 4) UUID and a random seed.
DrawnDefaults DrawDefaults();

}  // namespace lockstep

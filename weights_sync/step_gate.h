// Whoever computes with the weights that serve, as an update that writes into them sees it.
#pragma once

#include "absl/status/status.h"

namespace lockstep {

// Thread-safe. Each call waits for a step boundary.
class StepGate {
 public:
  virtual ~StepGate() = default;
  // Once it returns OK no step runs, and the device has finished those that did, until ReleaseSteps or the commit of an
  // update. UNAVAILABLE: whoever computes is stopping or has failed.
  virtual absl::Status HoldSteps() = 0;
  virtual void ReleaseSteps() = 0;
  // The weights are no version's: no step runs again, and what is in flight ends with `why`.
  virtual void FailSteps(absl::Status why) = 0;
};

}  // namespace lockstep

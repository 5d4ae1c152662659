// lockstep-worker's command line.
#pragma once

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rollout/server/server.h"
#include "rollout/worker/make_worker.h"

namespace lockstep {

struct WorkerFlags {
  WorkerOptions worker;
  ServerOptions server;
  absl::Duration drain;
};

// Parses argv. Prints and exits for --help and --version, and (status 1) for flags that do not exist or do not parse.
// INVALID_ARGUMENT names the flag, the value and what would be right.
absl::StatusOr<WorkerFlags> ParseWorkerFlags(int argc, char** argv);

}  // namespace lockstep

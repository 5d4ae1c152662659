// A worker program from its command line to its exit status.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "rollout/worker/make_worker.h"

namespace lockstep {

// `make_worker`: MakeWorker, or a test's own.
int WorkerMain(int argc, char** argv,
               absl::FunctionRef<absl::StatusOr<ServingModel>(const WorkerOptions&)> make_worker);

}  // namespace lockstep

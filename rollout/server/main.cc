// lockstep-worker: serves a checkpoint over gRPC. See --help.
#include "rollout/server/worker_main.h"
#include "rollout/worker/make_worker.h"

int main(int argc, char** argv) {
  return lockstep::WorkerMain(argc, argv, lockstep::MakeWorker);
}

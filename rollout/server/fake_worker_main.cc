// fake-worker-server: the worker's service over a FakeWorker, for tests that need to control its timing. Takes
// lockstep-worker's flags (--model is not read).
#include "absl/flags/flag.h"
#include "rollout/server/fake_worker.h"
#include "rollout/server/worker_main.h"

ABSL_FLAG(double, fake_step_ms, 1, "Duration of a step, which gives every running sequence one token.");
ABSL_FLAG(double, fake_next_version_seconds, -1, "When the weights become version (0, 1); negative: never.");
ABSL_FLAG(int64_t, fake_vocab_size, 1000, "Vocabulary size.");

namespace {

absl::StatusOr<lockstep::ServingModel> MakeFake(const lockstep::WorkerOptions& options) {
  const double next_version = absl::GetFlag(FLAGS_fake_next_version_seconds);
  return lockstep::MakeFakeModel(
      {.vocab_size = absl::GetFlag(FLAGS_fake_vocab_size),
       .max_sequences = options.max_sequences > 0 ? options.max_sequences : 64,
       .max_waiting_sequences = options.max_waiting_sequences,
       .step = absl::Milliseconds(absl::GetFlag(FLAGS_fake_step_ms)),
       .next_version_after = next_version < 0 ? absl::InfiniteDuration() : absl::Seconds(next_version)});
}

}  // namespace

int main(int argc, char** argv) {
  return lockstep::WorkerMain(argc, argv, MakeFake);
}

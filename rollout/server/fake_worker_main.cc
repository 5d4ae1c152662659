// fake-worker-server: the worker's service over a FakeWorker, for tests that need to control its timing. Takes
// lockstep-worker's flags (--model is not read).
#include "absl/flags/flag.h"
#include "rollout/server/fake_worker.h"
#include "rollout/server/worker_main.h"

ABSL_FLAG(double, fake_step_ms, 1, "Duration of a step, which gives every running sequence one token.");
ABSL_FLAG(double, fake_next_version_seconds, -1, "When the weights become version (0, 1); negative: never.");
ABSL_FLAG(double, fake_stuck_seconds, -1, "When steps no longer end; negative: never.");
ABSL_FLAG(double, fake_failed_seconds, -1, "When the device counts as failed; negative: never.");
ABSL_FLAG(int64_t, fake_vocab_size, 1000, "Vocabulary size.");

namespace {

absl::StatusOr<lockstep::ServingModel> MakeFake(const lockstep::WorkerOptions& options) {
  const auto after = [](double seconds) { return seconds < 0 ? absl::InfiniteDuration() : absl::Seconds(seconds); };
  return lockstep::MakeFakeModel({.vocab_size = absl::GetFlag(FLAGS_fake_vocab_size),
                                  .max_sequences = options.max_sequences > 0 ? options.max_sequences : 64,
                                  .max_waiting_sequences = options.max_waiting_sequences,
                                  .step = absl::Milliseconds(absl::GetFlag(FLAGS_fake_step_ms)),
                                  .next_version_after = after(absl::GetFlag(FLAGS_fake_next_version_seconds)),
                                  .stuck_after = after(absl::GetFlag(FLAGS_fake_stuck_seconds)),
                                  .failed_after = after(absl::GetFlag(FLAGS_fake_failed_seconds))});
}

}  // namespace

int main(int argc, char** argv) {
  return lockstep::WorkerMain(argc, argv, MakeFake);
}

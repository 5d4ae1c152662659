// The host's time of a decode step: the step loop on a device that computes nothing. Usage: step_loop_bench
//
// For each batch: microseconds a step in all, and of them from one step's results to the next one's start on the
// device, in which a real device would be idle (GetLoad's host_ms); the rest runs beside the device. What a GPU's
// backend adds (the batch's image, sampling tasks, launches) is not in it.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/check.h"
#include "rollout/worker/local_model.h"
#include "tests/testing/idle_backend.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

constexpr int64_t kPrompt = 1024;
constexpr int64_t kSteps = 2000;

void Measure(int64_t batch) {
  std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  // The model's weights are of the backend that it was made with, and never read by this one.
  std::unique_ptr<Backend> idle = MakeIdleBackend(model->ops().profile(), model->threads.get());
  std::swap(model->backend, idle);
  absl::StatusOr<LocalLoop> local = MakeLocalLoop(
      *model, {.max_batch_tokens = 8192, .max_sequences = batch, .max_kv_tokens = batch * (kPrompt + kSteps + 128)});
  LOCKSTEP_CHECK(local.ok(), "{}", std::string(local.status().message()));
  StepLoop& loop = *local->loop;
  for (int64_t i = 0; i < batch; ++i) {
    RequestSpec spec;
    spec.request_id = absl::StrCat("r", i);
    spec.prompt.assign(kPrompt, 1);
    spec.max_tokens = kSteps + 64;
    spec.logprobs.raw = true;
    loop.Submit(std::move(spec), std::make_shared<CollectingSink>(1), absl::Now());
  }
  while (loop.Load().generated_tokens < 8 * batch) LOCKSTEP_CHECK(loop.Step(), "the batch ended at {}", batch);
  const WorkerLoad before = loop.Load();
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kSteps; ++i) LOCKSTEP_CHECK(loop.Step(), "step {}", i);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const double idle_ms = loop.Load().host_ms - before.host_ms;
  std::printf("%6ld %10.1f %10.1f\n", static_cast<long>(batch), seconds / kSteps * 1e6, idle_ms / kSteps * 1e3);
  *local = {};  // before its backend goes
  std::swap(model->backend, idle);
}

}  // namespace
}  // namespace lockstep

int main() {
  std::printf(" batch    us/step   us idle\n");
  for (const int64_t batch : {1, 32, 128, 256}) lockstep::Measure(batch);
  return 0;
}

// The host's time of a step: the step loop on a device that computes nothing. Usage: step_loop_bench
//
// For each batch: microseconds a step in all, and of them from one step's results to the next one's start on the
// device, in which a real device would be idle (GetLoad's host_ms); the rest runs beside the device. What a GPU's
// backend adds (the batch's image, sampling tasks, launches) is not in it. Decode steps alone; then as served: as many
// requests of 2,048 in and 1,024 out at any time, a new one for each that ends, prompts riding in decode steps.
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

constexpr int64_t kSteps = 2000;

struct Load {
  int64_t prompt, max_tokens;
  int64_t mixed_batch_tokens = 0;
};
constexpr Load kDecode = {.prompt = 1024, .max_tokens = kSteps + 64};
constexpr Load kServed = {.prompt = 2048, .max_tokens = 1024, .mixed_batch_tokens = 512};

void Measure(const char* name, const Load& load, int64_t batch) {
  std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  // The model's weights are of the backend that it was made with, and never read by this one.
  std::unique_ptr<Backend> idle = MakeIdleBackend(model->ops().profile(), model->threads.get());
  std::swap(model->backend, idle);
  absl::StatusOr<LocalLoop> local =
      MakeLocalLoop(*model, {.max_batch_tokens = 8192,
                             .mixed_batch_tokens = load.mixed_batch_tokens,
                             .max_sequences = batch,
                             .max_kv_tokens = batch * (load.prompt + load.max_tokens + 128)});
  LOCKSTEP_CHECK(local.ok(), "{}", std::string(local.status().message()));
  StepLoop& loop = *local->loop;
  int64_t submitted = 0;
  const auto step = [&] {
    for (int64_t flying = loop.Load().running_requests; flying < batch; ++flying) {
      RequestSpec spec;
      spec.request_id = absl::StrCat("r", submitted++);
      spec.prompt.assign(load.prompt, 1);
      spec.max_tokens = load.max_tokens;
      spec.logprobs.raw = true;
      loop.Submit(std::move(spec), std::make_shared<CollectingSink>(1), absl::Now());
    }
    LOCKSTEP_CHECK(loop.Step(), "nothing to run at {}", batch);
  };
  while (loop.Load().generated_tokens < 8 * batch) step();
  const WorkerLoad before = loop.Load();
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kSteps; ++i) step();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const double idle_ms = loop.Load().host_ms - before.host_ms;
  std::printf("%-7s %6ld %10.1f %10.1f\n", name, static_cast<long>(batch), seconds / kSteps * 1e6,
              idle_ms / kSteps * 1e3);
  *local = {};  // before its backend goes
  std::swap(model->backend, idle);
}

}  // namespace
}  // namespace lockstep

int main() {
  std::printf("load     batch    us/step    us idle\n");
  for (const int64_t batch : {1, 32, 128, 256}) lockstep::Measure("decode", lockstep::kDecode, batch);
  for (const int64_t batch : {32, 128, 256}) lockstep::Measure("served", lockstep::kServed, batch);
  return 0;
}

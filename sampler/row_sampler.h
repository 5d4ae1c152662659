// From rows of logits, wherever they lie, to tokens and log-probabilities: what a backend makes of sampler/sampler.h.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/base/thread_pool.h"
#include "sampler/sampler.h"

namespace lockstep {

// What to make of one row's logits. Several tasks may name one row (samples that fork from it).
struct RowTask {
  int64_t piece = 0;  // index into StepInput::pieces
  int64_t row = 0;    // within the piece
  // Tells requests apart, for as long as the sampler lives: tasks of one have one `params`, which do not change until
  // Forget, so a sampler may keep what it makes of them. 0: no request's; where lists are kept, on CUDA, such a task
  // has no allowed_token_ids or logit_bias.
  uint64_t request = 0;
  const SamplingParams* params = nullptr;
  const LogprobOptions* options = nullptr;
  const TokenHistory* history = nullptr;
  DrawKey key;          // sampling
  bool forced = false;  // score `forced_token` instead of sampling
  int32_t forced_token = 0;
};

struct SampleTask {
  int64_t logits_row = 0;
  const RowTask* task = nullptr;
};

class RowSampler {
 public:
  virtual ~RowSampler() = default;
  // Starts `tasks` on `logits` [rows, vocab] (values of the backend's logit_dtype()). What the tasks point to must stay
  // until Collect; `logits` may be overwritten by operations asked for later.
  virtual void Enqueue(Rows logits, std::span<const SampleTask> tasks) = 0;
  // The results of everything enqueued since the last call, in order. Waits for them, and so for whatever the device
  // was asked for before. An error of the call itself is the sampler's own (no memory, or the device's): nothing can be
  // sampled after it.
  virtual absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() = 0;
  // RowTask::request has ended, and its number will not come again: what was kept of it goes. Between steps. A sampler
  // that keeps nothing has nothing to do.
  virtual void Forget(uint64_t) {}
};

// sampler/sampler.h on host memory, a task a thread. `threads` must outlive it.
std::unique_ptr<RowSampler> MakeCpuRowSampler(ThreadPool& threads);

}  // namespace lockstep

// A model loaded into this process, and step loops over it: what the worker, the tools and the tests share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/engine/backend.h"
#include "rollout/engine/engine.h"
#include "rollout/model/spec.h"
#include "rollout/model/tokenizer.h"
#include "rollout/model/weights.h"
#include "rollout/worker/step_loop.h"

namespace lockstep {

struct LocalModel {
  ModelSpec spec;
  std::unique_ptr<ThreadPool> threads;
  std::unique_ptr<Backend> backend;
  ModelWeights weights;
  std::optional<TokenBytes> token_bytes;  // nullopt: the directory has no tokenizer.json

  Ops& ops() const { return backend->ops(); }
};

// Loads DIR onto a backend under the named numerics profile.
absl::StatusOr<std::unique_ptr<LocalModel>> LoadLocalModel(const std::filesystem::path& dir,
                                                           const std::string& numerics, int threads,
                                                           const BackendOptions& backend);

struct LoopConfig {
  int64_t page_size = 64;
  int64_t max_batch_tokens = 512;
  int64_t mixed_batch_tokens = 0;  // SchedulerConfig's
  int64_t max_sequences = 64;      // state slots
  int64_t max_kv_tokens = 0;       // positions over all sequences; rounded up to pages
  std::optional<uint64_t> disturb_seed;
};

// Pages and slots that `bytes` of memory hold: slots (a state, and room for a request's token lists where the device
// keeps them) in at most half of it (if more than one), as many KV tokens as fit in the rest. INVALID_ARGUMENT when not
// even one sequence of `min_tokens` fits.
absl::StatusOr<LoopConfig> FitMemory(const LocalModel& model, LoopConfig config, int64_t bytes, int64_t min_tokens);

// An engine and a step loop over a model, which must outlive it.
struct LocalLoop {
  std::unique_ptr<Engine> engine;
  std::unique_ptr<StepLoop> loop;
};
absl::StatusOr<LocalLoop> MakeLocalLoop(LocalModel& model, const LoopConfig& config);

// A sink that keeps everything: one per request.
struct CollectedSample {
  std::vector<int32_t> tokens;
  std::vector<RowLogprobs> logprobs;
  SampleResult result;
  bool done = false;
};
class CollectingSink : public RequestSink {
 public:
  explicit CollectingSink(int32_t samples) : samples_(samples) {}
  void OnPromptLogprobs(PromptLogprobs logprobs) override;
  void OnTokens(SampleTokens tokens) override;
  void OnSampleDone(int32_t sample, SampleResult result) override;

  const std::vector<CollectedSample>& samples() const { return samples_; }
  const std::vector<RowLogprobs>& prompt_logprobs() const { return prompt_logprobs_; }

 private:
  std::vector<CollectedSample> samples_;
  std::vector<RowLogprobs> prompt_logprobs_;
};

// Runs requests to their end and returns their sinks, in order.
std::vector<std::shared_ptr<CollectingSink>> RunAll(StepLoop& loop, const std::vector<RequestSpec>& requests);

}  // namespace lockstep

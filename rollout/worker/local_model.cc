#include "rollout/worker/local_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep {

absl::StatusOr<std::unique_ptr<LocalModel>> LoadLocalModel(const std::filesystem::path& dir,
                                                           const std::string& numerics, int threads,
                                                           const BackendOptions& backend) {
  LOCKSTEP_ASSIGN_OR_RETURN(const NumericsProfile profile, FindNumericsProfile(numerics));
  auto model = std::make_unique<LocalModel>();
  LOCKSTEP_ASSIGN_OR_RETURN(model->spec, LoadModelSpec(dir));
  model->threads = std::make_unique<ThreadPool>(threads);
  LOCKSTEP_ASSIGN_OR_RETURN(model->backend, MakeBackend(backend, profile, model->threads.get()));
  LOCKSTEP_RETURN_IF_ERROR(model->backend->CheckModel(model->spec));
  LOCKSTEP_ASSIGN_OR_RETURN(model->weights, LoadModelWeights(dir, model->spec, model->ops()));
  const std::filesystem::path tokenizer = dir / "tokenizer.json";
  if (std::filesystem::exists(tokenizer)) {
    LOCKSTEP_ASSIGN_OR_RETURN(model->token_bytes, TokenBytes::Load(tokenizer));
  }
  return model;
}

absl::StatusOr<LoopConfig> FitMemory(const LocalModel& model, LoopConfig config, int64_t bytes, int64_t min_tokens) {
  // What a sequence that runs takes besides pages; samples of one request share its lists, or they may be of as many.
  const int64_t slot =
      MakeStateLayout(model.spec, model.ops()).bytes + model.backend->SamplerBytesPerRequest(model.spec.vocab_size);
  const int64_t page = KvBytesPerPage(model.spec, model.ops(), config.page_size);
  if (page == 0) {
    const int64_t slots = slot == 0 ? config.max_sequences : std::min(config.max_sequences, bytes / slot);
    if (slots < 1)
      return absl::InvalidArgumentError(absl::StrCat("one sequence's state takes ", slot, " bytes; there are ", bytes));
    config.max_sequences = slots;
    config.max_kv_tokens = 0;
    return config;
  }
  const int64_t pages_needed = (min_tokens + config.page_size - 1) / config.page_size;
  // At most half for the states: slots that find no pages run nothing.
  const int64_t at_least_one = bytes >= slot + pages_needed * page ? 1 : 0;
  const int64_t slots = slot == 0
                            ? config.max_sequences
                            : std::min(config.max_sequences,
                                       std::max(at_least_one, std::min(bytes / 2, bytes - pages_needed * page) / slot));
  const int64_t pages = (bytes - slots * slot) / page;
  if (slots < 1 || pages < pages_needed) {
    return absl::InvalidArgumentError(
        absl::StrCat("a sequence of ", min_tokens, " tokens takes ", slot + pages_needed * page,
                     " bytes of KV cache and of what a sequence has besides; there are ", bytes));
  }
  config.max_sequences = slots;
  // More than every slot could fill is of no use.
  const int64_t useful = slots * ((model.spec.max_position + config.page_size - 1) / config.page_size);
  config.max_kv_tokens = std::min(pages, useful) * config.page_size;
  return config;
}

absl::StatusOr<LocalLoop> MakeLocalLoop(LocalModel& model, const LoopConfig& config) {
  const bool has_kv = KvBytesPerPage(model.spec, model.ops(), config.page_size) > 0;
  const int64_t pages = has_kv ? (config.max_kv_tokens + config.page_size - 1) / config.page_size : 0;
  LOCKSTEP_CHECK(!has_kv || pages > 0, "a model with attention needs KV pages");
  LocalLoop local;
  LOCKSTEP_ASSIGN_OR_RETURN(local.engine, Engine::Create(model.spec, model.weights, *model.backend,
                                                         {.page_size = config.page_size,
                                                          .slots = config.max_sequences,
                                                          .pages = pages,
                                                          .max_rows = config.max_batch_tokens}));
  local.loop = std::make_unique<StepLoop>(*local.engine,
                                          SchedulerConfig{.page_size = config.page_size,
                                                          .pages = pages,
                                                          .slots = config.max_sequences,
                                                          .max_batch_tokens = config.max_batch_tokens,
                                                          .mixed_batch_tokens = config.mixed_batch_tokens,
                                                          .disturb_seed = config.disturb_seed},
                                          model.token_bytes ? &*model.token_bytes : nullptr);
  return local;
}

void CollectingSink::OnPromptLogprobs(PromptLogprobs logprobs) {
  prompt_logprobs_.insert(prompt_logprobs_.end(), logprobs.logprobs.begin(), logprobs.logprobs.end());
}

void CollectingSink::OnTokens(SampleTokens tokens) {
  CollectedSample& sample = samples_.at(tokens.sample);
  sample.tokens.insert(sample.tokens.end(), tokens.tokens.begin(), tokens.tokens.end());
  sample.logprobs.insert(sample.logprobs.end(), tokens.logprobs.begin(), tokens.logprobs.end());
}

void CollectingSink::OnSampleDone(int32_t sample, SampleResult result) {
  LOCKSTEP_CHECK(!samples_.at(sample).done, "sample {} ended twice", sample);
  samples_[sample].result = std::move(result);
  samples_[sample].done = true;
}

std::vector<std::shared_ptr<CollectingSink>> RunAll(StepLoop& loop, const std::vector<RequestSpec>& requests) {
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (const RequestSpec& request : requests) {
    sinks.push_back(std::make_shared<CollectingSink>(std::max(request.n, 1)));
    loop.Submit(request, sinks.back(), absl::Now());
  }
  while (loop.Step()) {
  }
  return sinks;
}

}  // namespace lockstep

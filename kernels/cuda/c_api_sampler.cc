// The device sampler for callers in other languages: one set of parameters for all rows of a call.
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/c_api.h"
#include "kernels/cuda/sampling/device_sampler.h"

namespace {

using lockstep::cuda::CApiResult;

struct Sampler {
  std::unique_ptr<lockstep::RowSampler> rows;
  lockstep::SamplingParams params;
  lockstep::LogprobOptions options;
  lockstep::TokenHistory history{{}, false};
  std::vector<std::vector<lockstep::RowTask>> tasks;  // by enqueued call
  std::vector<lockstep::SampleTask> row_tasks;
};

}  // namespace

// `rounding`: a TemperatureRounding. Null, with the reason in lockstep_last_error(), if there is none to be had.
extern "C" void* lockstep_sampler_create(int64_t vocab, int rounding, void* stream) {
  absl::StatusOr<std::unique_ptr<lockstep::RowSampler>> rows = lockstep::cuda::MakeDeviceSampler(
      {.vocab = vocab,
       .temperature_rounding = static_cast<lockstep::cuda::TemperatureRounding>(rounding),
       .stream = static_cast<cudaStream_t>(stream)});
  if (CApiResult(rows.status()) != 0) return nullptr;
  auto sampler = std::make_unique<Sampler>();
  sampler->rows = *std::move(rows);
  return sampler.release();
}

extern "C" void lockstep_sampler_destroy(void* handle) {
  delete static_cast<Sampler*>(handle);
}

// Parameters of the calls that follow; none may be outstanding. `logprobs`: whether RAW and TEMPERATURE are wanted.
extern "C" void lockstep_sampler_set(void* handle, float temperature, int32_t top_k, float top_p, float min_p,
                                     int logprobs) {
  auto& sampler = *static_cast<Sampler*>(handle);
  sampler.params = {.temperature = temperature, .top_p = top_p, .top_k = top_k, .min_p = min_p};
  sampler.options = {.raw = logprobs != 0, .temperature = logprobs != 0};
}

// A task a row. `forced`: [rows] host token ids to score, or null to draw.
extern "C" void lockstep_sampler_enqueue(void* handle, void* logits, int fp32, int64_t rows, int64_t vocab,
                                         int64_t stride, const int32_t* forced, uint64_t seed) {
  auto& sampler = *static_cast<Sampler*>(handle);
  std::vector<lockstep::RowTask>& tasks = sampler.tasks.emplace_back(rows);
  sampler.row_tasks.clear();
  for (int64_t r = 0; r < rows; ++r) {
    tasks[r].params = &sampler.params;
    tasks[r].options = &sampler.options;
    tasks[r].history = &sampler.history;
    tasks[r].key = {.seed = seed, .sample_index = static_cast<uint32_t>(r)};
    tasks[r].forced = forced != nullptr;
    if (forced != nullptr) tasks[r].forced_token = forced[r];
    sampler.row_tasks.push_back({r, &tasks[r]});
  }
  sampler.rows->Enqueue({logits, rows, vocab, stride, fp32 != 0 ? lockstep::DType::kF32 : lockstep::DType::kBF16},
                        sampler.row_tasks);
}

// Host arrays, one entry for every row enqueued since the last call. Returns 1 where the sampler has failed, and at the
// first task that did.
extern "C" int lockstep_sampler_collect(void* handle, int32_t* tokens, float* raw, float* temperature) {
  auto& sampler = *static_cast<Sampler*>(handle);
  const absl::StatusOr<std::vector<absl::StatusOr<lockstep::SampledToken>>> collected = sampler.rows->Collect();
  sampler.tasks.clear();
  if (!collected.ok()) return CApiResult(collected.status());
  const std::vector<absl::StatusOr<lockstep::SampledToken>>& results = *collected;
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].ok()) return CApiResult(results[i].status());
    tokens[i] = results[i]->token;
    raw[i] = results[i]->logprobs.raw;
    temperature[i] = results[i]->logprobs.temperature;
  }
  return 0;
}

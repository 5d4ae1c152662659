#include "kernels/cuda/sampling/device_sampler.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/sampling/adjust_rows.h"
#include "kernels/cuda/sampling/device_token_lists.h"
#include "kernels/cuda/sampling/sample_rows.h"
#include "kernels/cuda/sampling/task_packer.h"
#include "kernels/cuda/sampling/token_lists.h"
#include "kernels/float_bits.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"
#include "sampler/adjust.h"
#include "sampler/logsumexp.h"
#include "sampler/mass.h"

namespace lockstep::cuda {
namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();
constexpr int64_t kAdjustedRows = 32;  // fp32 rows at a time
constexpr int64_t kSmallestBuffer = int64_t{1} << 16;

// Both sides of one copy. Grows to powers of two, keeping nothing.
struct Buffer {
  PinnedMemory host;
  std::unique_ptr<CudaMemory> device;

  absl::Status Reserve(int64_t bytes) {
    if (host.bytes() >= bytes) return absl::OkStatus();
    const auto size = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kSmallestBuffer))));
    LOCKSTEP_ASSIGN_OR_RETURN(device, CudaMemory::Allocate(size));
    LOCKSTEP_ASSIGN_OR_RETURN(host, PinnedMemory::Allocate(size));
    return absl::OkStatus();
  }
};

// One Enqueue.
struct Batch {
  struct Task {
    const RowTask* row_task = nullptr;
    int64_t lists = 0, kept = 0;  // PackedTask's
  };
  std::vector<Task> tasks;
  Buffer in;                    // [DeviceTask] [TokenPenalty] [masked tokens]
  PinnedMemory token_lists;     // those that the device does not have yet
  Buffer out;                   // [DeviceResult] [list entries] [kept bits]
  int64_t lists = 0, kept = 0;  // where those begin in `out`, bytes
};

class DeviceSampler final : public RowSampler {
 public:
  explicit DeviceSampler(const DeviceSamplerOptions& options) : options_(options), packer_(options.vocab) {}
  ~DeviceSampler() override;
  absl::Status Init();

  void Enqueue(Rows logits, std::span<const SampleTask> tasks) override;
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override;
  void Forget(uint64_t request) override { token_lists_->Forget(request); }

 private:
  absl::Status Start(Rows logits, Batch& batch);
  absl::Status Launch(SampleRowsParams params, int64_t begin, int64_t end, bool adjust) const;
  absl::StatusOr<SampledToken> Result(const Batch& batch, size_t index) const;
  absl::Status Failure(const RowTask& task, const DeviceResult& result) const;
  RowLogprobs Report(const Batch& batch, size_t index) const;

  const DeviceSamplerOptions options_;
  TaskPacker packer_;
  std::unique_ptr<DeviceTokenLists> token_lists_;
  int multiprocessors_ = 0;
  cudaEvent_t done_ = nullptr;
  absl::Status status_;         // the first error; there is no way back from one
  std::vector<Batch> batches_;  // [0, used_): enqueued since the last Collect; the others are kept for their memory
  size_t used_ = 0;
  // Rows after their edits; the stream orders their users. Allocated when first needed.
  std::unique_ptr<CudaMemory> adjusted_;
};

DeviceSampler::~DeviceSampler() {
  if (done_ == nullptr) return;
  cudaStreamSynchronize(options_.stream);  // copies to memory that goes away now
  cudaEventDestroy(done_);
}

absl::Status DeviceSampler::Init() {
  LOCKSTEP_ASSIGN_OR_RETURN(token_lists_, DeviceTokenLists::Create(options_.vocab, options_.requests));
  int device = 0;
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device), "cudaGetDevice"));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
                                      "cudaDeviceGetAttribute"));
  return CudaStatus(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
}

void DeviceSampler::Enqueue(Rows logits, std::span<const SampleTask> tasks) {
  if (tasks.empty()) return;
  if (used_ == batches_.size()) batches_.emplace_back();
  Batch& batch = batches_[used_++];
  batch.tasks.clear();
  for (const SampleTask& task : tasks) {
    LOCKSTEP_CHECK(task.logits_row >= 0 && task.logits_row < logits.rows, "row {} of {}", task.logits_row, logits.rows);
    batch.tasks.push_back({.row_task = task.task});
  }
  if (!status_.ok()) return;
  packer_.Pack(tasks);
  status_ = Start(logits, batch);
}

absl::Status DeviceSampler::Start(Rows logits, Batch& batch) {
  if (logits.width != options_.vocab) return BadField("logits.width", logits.width, "the sampler's vocabulary");
  if (logits.dtype != DType::kBF16 && logits.dtype != DType::kF32) {
    return BadField("logits.dtype", std::string(DTypeName(logits.dtype)), "bfloat16 or float32");
  }
  const auto count = static_cast<int64_t>(batch.tasks.size());
  const int64_t task_bytes = count * static_cast<int64_t>(sizeof(DeviceTask));
  const auto penalty_bytes = static_cast<int64_t>(packer_.penalties().size() * sizeof(TokenPenalty));
  const auto masked_bytes = static_cast<int64_t>(packer_.masked().size() * sizeof(int32_t));
  const int64_t in_bytes = task_bytes + penalty_bytes + masked_bytes;
  batch.lists = count * static_cast<int64_t>(sizeof(DeviceResult));
  batch.kept = batch.lists + packer_.list_entries() * static_cast<int64_t>(sizeof(uint64_t));
  const int64_t out_bytes = batch.kept + packer_.kept_bytes();
  LOCKSTEP_RETURN_IF_ERROR(batch.in.Reserve(in_bytes));
  LOCKSTEP_RETURN_IF_ERROR(batch.out.Reserve(out_bytes));

  const int64_t adjusted_stride = (options_.vocab + 7) / 8 * 8;
  auto* const tasks = reinterpret_cast<DeviceTask*>(batch.in.host.data());
  const std::byte* const in = batch.in.device->data();
  std::byte* const out = batch.out.device->data();
  int64_t adjusted = 0;
  for (int64_t i = 0; i < count; ++i) {
    PackedTask& packed = packer_.tasks()[i];
    if (packed.device.list_size > 0)
      packed.device.lists = reinterpret_cast<uint64_t*>(out + batch.lists) + packed.lists;
    if (packed.keeps_bits) packed.device.kept = reinterpret_cast<uint8_t*>(out + batch.kept) + packed.kept;
    if (packed.adjusted) {
      if (adjusted_ == nullptr) {
        LOCKSTEP_ASSIGN_OR_RETURN(
            adjusted_, CudaMemory::Allocate(kAdjustedRows * adjusted_stride * static_cast<int64_t>(sizeof(float))));
      }
      token_lists_->Place(*batch.tasks[i].row_task, packed.device);
      packed.device.penalties = reinterpret_cast<const TokenPenalty*>(in + task_bytes) + packed.penalties;
      packed.device.masked = reinterpret_cast<const int32_t*>(in + task_bytes + penalty_bytes) + packed.masked;
      packed.device.adjusted =
          reinterpret_cast<float*>(adjusted_->data()) + adjusted++ % kAdjustedRows * adjusted_stride;
    }
    batch.tasks[i].lists = packed.lists;
    batch.tasks[i].kept = packed.kept;
    tasks[i] = packed.device;
  }
  std::byte* const host = batch.in.host.data() + task_bytes;
  if (penalty_bytes > 0) std::memcpy(host, packer_.penalties().data(), penalty_bytes);
  if (masked_bytes > 0) std::memcpy(host + penalty_bytes, packer_.masked().data(), masked_bytes);
  LOCKSTEP_RETURN_IF_ERROR(token_lists_->Send(batch.token_lists, options_.stream));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(batch.in.device->data(), batch.in.host.data(), in_bytes, cudaMemcpyHostToDevice, options_.stream),
      "cudaMemcpyAsync of sampling tasks"));

  const SampleRowsParams params = {.logits = logits.data,
                                   .fp32 = logits.dtype == DType::kF32,
                                   .logits_stride = logits.stride,
                                   .tasks = reinterpret_cast<const DeviceTask*>(in),
                                   .results = reinterpret_cast<DeviceResult*>(out),
                                   .vocab = options_.vocab,
                                   .temperature_rounding = options_.temperature_rounding};
  // As many tasks a launch as there are adjusted rows for.
  int64_t begin = 0, rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool more = packer_.tasks()[i].adjusted;
    if (more && rows == kAdjustedRows) {
      LOCKSTEP_RETURN_IF_ERROR(Launch(params, begin, i, /*adjust=*/true));
      begin = i;
      rows = 0;
    }
    rows += more ? 1 : 0;
  }
  LOCKSTEP_RETURN_IF_ERROR(Launch(params, begin, count, /*adjust=*/rows > 0));
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(batch.out.host.data(), out, out_bytes, cudaMemcpyDeviceToHost, options_.stream),
                 "cudaMemcpyAsync of sampling results"));
  return CudaStatus(cudaEventRecord(done_, options_.stream), "cudaEventRecord");
}

absl::Status DeviceSampler::Launch(SampleRowsParams params, int64_t begin, int64_t end, bool adjust) const {
  params.tasks += begin;
  params.results += begin;
  params.count = end - begin;
  if (adjust) LOCKSTEP_RETURN_IF_ERROR(LaunchAdjustRows(params, options_.stream));
  return LaunchSampleRows(params, SampleBlocksPerTask(params.count, multiprocessors_), options_.stream);
}

absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> DeviceSampler::Collect() {
  const std::span<const Batch> batches(batches_.data(), std::exchange(used_, 0));
  if (!batches.empty() && status_.ok()) status_ = CudaStatus(cudaEventSynchronize(done_), "a step on the device");
  if (!status_.ok()) return status_;
  token_lists_->EndStep();
  size_t count = 0;
  for (const Batch& batch : batches) count += batch.tasks.size();
  std::vector<absl::StatusOr<SampledToken>> results;
  results.reserve(count);
  for (const Batch& batch : batches) {
    for (size_t i = 0; i < batch.tasks.size(); ++i) results.push_back(Result(batch, i));
  }
  return results;
}

const DeviceResult& ResultOf(const Batch& batch, size_t index) {
  return reinterpret_cast<const DeviceResult*>(batch.out.host.data())[index];
}

absl::StatusOr<SampledToken> DeviceSampler::Result(const Batch& batch, size_t index) const {
  const DeviceResult& result = ResultOf(batch, index);
  if (result.status != SampleStatus::kOk) return Failure(*batch.tasks[index].row_task, result);
  return SampledToken{.token = result.token, .logprobs = Report(batch, index)};
}

// The words of sampler.cc.
absl::Status DeviceSampler::Failure(const RowTask& task, const DeviceResult& result) const {
  const char* what = nullptr;
  switch (result.status) {
    case SampleStatus::kRowEmpty:
      return absl::FailedPreconditionError(absl::StrCat("logits: all ", options_.vocab, " are -inf"));
    case SampleStatus::kNothingLeft:
      return absl::FailedPreconditionError(
          absl::StrCat("sampling: no token is left to draw from: ", DescribeMasks(*task.params, *task.history)));
    case SampleStatus::kLogitNotFinite:
      what = "logits: the logit";
      break;
    case SampleStatus::kScaledNotFinite:
      what = "sampling.temperature: logit / temperature";
      break;
    default:
      what = "sampling: the logit after penalties, logit_bias and temperature";
      break;
  }
  return absl::InternalError(
      absl::StrCat(what, " of token ", result.token, " is ", result.bad_value, "; want finite or -inf"));
}

// The entries of one list, their values turned to log-probabilities by `logprob`.
template <class LogProb>
std::vector<TokenLogprob> ReadList(const Batch& batch, size_t index, SampleList list, const LogProb& logprob) {
  const Batch::Task& task = batch.tasks[index];
  const uint64_t* entries = reinterpret_cast<const uint64_t*>(batch.out.host.data() + batch.lists) + task.lists +
                            int64_t{list} * task.row_task->options->top_k;
  std::vector<TokenLogprob> most_probable(ResultOf(batch, index).list_counts[list]);
  for (TokenLogprob& entry : most_probable) {
    entry = {.token = static_cast<int32_t>(static_cast<uint32_t>(*entries)),
             .logprob = logprob(std::bit_cast<float>(static_cast<uint32_t>(*entries >> 32)))};
    ++entries;
  }
  std::sort(most_probable.begin(), most_probable.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
  });
  return most_probable;
}

float Scale(float x, float temperature, TemperatureRounding rounding) {
  if (rounding == TemperatureRounding::kDivide) return x / temperature;
  const float y = x * (1.0f / temperature);
  return rounding == TemperatureRounding::kReciprocal ? y : Bf16ToF32(F32ToBf16(y));
}

RowLogprobs DeviceSampler::Report(const Batch& batch, size_t index) const {
  const DeviceResult& result = ResultOf(batch, index);
  const RowTask& task = *batch.tasks[index].row_task;
  const LogprobOptions& options = *task.options;
  const bool greedy = task.params->temperature == 0.0f;
  const bool scaled = !greedy && task.params->temperature != 1.0f;
  const bool list = options.top_k > 0;
  RowLogprobs logprobs;
  const auto raw = [&](float x) { return (x - result.max_logit) - result.log_sum_raw; };
  if (options.raw || (options.temperature && !scaled)) {
    const float logprob = raw(result.logit);
    std::vector<TokenLogprob> top;
    if (list) top = ReadList(batch, index, kListRaw, raw);
    if (options.temperature && !scaled) {
      logprobs.temperature = logprob;
      logprobs.top_temperature = top;
    }
    if (options.raw) {
      logprobs.raw = logprob;
      logprobs.top_raw = std::move(top);
    }
  }
  if (options.temperature && scaled) {
    const auto scale = [&](float x) { return Scale(x, task.params->temperature, options_.temperature_rounding); };
    const float max = scale(result.max_logit);
    const auto of_scaled = [&](float y) { return (y - max) - result.log_sum_temperature; };
    logprobs.temperature = of_scaled(scale(result.logit));
    if (list) logprobs.top_temperature = ReadList(batch, index, kListTemperature, of_scaled);
  }
  if (greedy) {
    if (options.processed) {
      logprobs.processed = result.token == result.argmax ? 0.0f : kImpossible;
      if (list) logprobs.top_processed = {{.token = result.argmax, .logprob = 0.0f}};
    }
    if (options.kept_token_ids) logprobs.kept_token_ids = {result.argmax};
    return logprobs;
  }
  if (options.processed) {
    const Softmax softmax = {
        .max = result.max_processed, .total = result.mass, .log_total = LogRatio(result.mass, kMassUnits)};
    const auto of_processed = [&](float y) { return softmax.LogProb(y) + 0.0f; };  // no -0 where zeros are the maximum
    logprobs.processed = of_processed(result.processed);
    if (list) logprobs.top_processed = ReadList(batch, index, kListProcessed, of_processed);
  }
  if (options.kept_token_ids) {
    const std::byte* const bits = batch.out.host.data() + batch.kept + batch.tasks[index].kept;
    logprobs.kept_token_ids = KeptTokens({bits, static_cast<size_t>(KeptBytes(options_.vocab))});
  }
  return logprobs;
}

}  // namespace

int64_t DeviceSamplerBytesPerRequest(int64_t vocab) {
  return MaxTokenListBytes(vocab);
}

absl::StatusOr<std::unique_ptr<RowSampler>> MakeDeviceSampler(const DeviceSamplerOptions& options) {
  if (options.vocab < 1 || options.vocab > kMaxVocabSize) {
    return BadField("DeviceSamplerOptions.vocab", options.vocab, "1 to 262144");
  }
  auto sampler = std::make_unique<DeviceSampler>(options);
  LOCKSTEP_RETURN_IF_ERROR(sampler->Init());
  return sampler;
}

}  // namespace lockstep::cuda

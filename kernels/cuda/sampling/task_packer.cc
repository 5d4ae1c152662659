#include "kernels/cuda/sampling/task_packer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "rollout/base/check.h"
#include "sampler/adjust.h"
#include "sampler/filters.h"

namespace lockstep::cuda {
namespace {

// Whether the tokens so far end in all of `words` but the last.
bool WouldComplete(std::span<const int32_t> tokens, std::span<const int32_t> words) {
  const std::span<const int32_t> before = words.first(words.size() - 1);
  return before.size() <= tokens.size() && std::equal(before.begin(), before.end(), tokens.end() - before.size());
}

}  // namespace

// By words: a row with its 100,000 bits is read while the device is idle.
std::vector<int32_t> KeptTokens(std::span<const std::byte> bits) {
  constexpr size_t kWord = sizeof(uint64_t);
  const auto word_at = [&](size_t w) {
    uint64_t word = 0;
    std::memcpy(&word, bits.data() + w * kWord, kWord);
    return word;
  };
  const size_t words = bits.size() / kWord;
  size_t count = 0;
  for (size_t w = 0; w < words; ++w) count += std::popcount(word_at(w));
  std::vector<int32_t> tokens;
  tokens.reserve(count);
  for (size_t w = 0; w < words; ++w) {
    for (uint64_t word = word_at(w); word != 0; word &= word - 1) {
      tokens.push_back(static_cast<int32_t>(w * 64) + std::countr_zero(word));
    }
  }
  return tokens;
}

void TaskPacker::Pack(std::span<const SampleTask> tasks) {
  tasks_.clear();
  penalties_.clear();
  masked_.clear();
  list_entries_ = kept_bytes_ = 0;
  for (const SampleTask& task : tasks) tasks_.push_back(PackOne(task));
}

PackedTask TaskPacker::PackOne(const SampleTask& sample) {
  const RowTask& task = *sample.task;
  const SamplingParams& params = *task.params;
  const LogprobOptions& options = *task.options;
  const bool greedy = params.temperature == 0.0f;
  const float divisor = greedy ? 1.0f : params.temperature;
  const bool scaled = divisor != 1.0f;
  const bool processed = !task.forced || options.processed || options.kept_token_ids;

  PackedTask packed;
  DeviceTask& device = packed.device;
  device.row = static_cast<int32_t>(sample.logits_row);
  if (task.forced) {
    LOCKSTEP_CHECK(task.forced_token >= 0 && task.forced_token < vocab_, "token {} in a vocabulary of {}",
                   task.forced_token, vocab_);
    device.token = task.forced_token;
  }
  device.temperature = divisor;
  device.inverse = 1.0f / divisor;
  if (options.raw || (options.temperature && !scaled)) device.flags |= kSampleRaw;
  if (options.temperature && scaled) device.flags |= kSampleTemperature;
  if (processed) device.flags |= kSampleProcessed;
  if (greedy) device.flags |= kSampleGreedy;
  if (options.top_k > 0) {
    if (options.raw || (options.temperature && !scaled)) device.flags |= kSampleListRaw;
    if (options.temperature && scaled) device.flags |= kSampleListTemperature;
    if (options.processed && !greedy) device.flags |= kSampleListProcessed;
    device.list_size = options.top_k;
    packed.lists = list_entries_;
    list_entries_ += int64_t{kSampleLists} * options.top_k;
  }
  if (processed && !greedy) {
    if (HasFilters(params, vocab_)) {
      if (params.top_k > 0 && params.top_k < vocab_) device.top_k = params.top_k;
      if (params.top_p < 1.0f) {
        device.top_p = static_cast<uint64_t>(std::ceil(std::ldexp(static_cast<double>(params.top_p), 48)));
      }
      device.min_p = params.min_p;
    }
    if (!task.forced) device.draw = static_cast<uint64_t>(UniformDraw(task.key) * 0x1p53);  // exact
    if (options.kept_token_ids) {
      packed.keeps_bits = true;
      packed.kept = kept_bytes_;
      kept_bytes_ += KeptBytes(vocab_);
    }
  }
  if (processed && HasAdjustments(params, *task.history)) PackAdjustments(task, packed);
  return packed;
}

void TaskPacker::Mask(int32_t token) {
  LOCKSTEP_CHECK(token >= 0 && token < vocab_, "token {} in a vocabulary of {}", token, vocab_);
  masked_.push_back(token);
}

void TaskPacker::PackAdjustments(const RowTask& task, PackedTask& packed) {
  const SamplingParams& params = *task.params;
  const TokenHistory& history = *task.history;
  packed.adjusted = true;
  packed.penalties = static_cast<int64_t>(penalties_.size());
  packed.masked = static_cast<int64_t>(masked_.size());
  packed.device.repetition_penalty = params.repetition_penalty;
  packed.device.frequency_penalty = params.frequency_penalty;
  packed.device.presence_penalty = params.presence_penalty;
  if (NeedsCounts(params)) {
    LOCKSTEP_CHECK(history.tokens().empty() || !history.counts().empty(),
                   "a penalty is on, but the TokenHistory was built without counts");
    for (const TokenHistory::Count& count : history.counts()) {
      LOCKSTEP_CHECK(count.token >= 0 && count.token < vocab_, "token {} in a vocabulary of {}", count.token, vocab_);
      penalties_.push_back({.token = count.token, .generated = count.generated});
    }
  }
  for (const std::vector<int32_t>& words : params.bad_words) {
    if (WouldComplete(history.tokens(), words)) Mask(words.back());
  }
  if (history.generated() < params.min_tokens) {
    for (const int32_t token : params.eos_token_ids) Mask(token);
    for (const int32_t token : params.stop_token_ids) Mask(token);
  }
  packed.device.penalty_count = static_cast<int32_t>(static_cast<int64_t>(penalties_.size()) - packed.penalties);
  packed.device.masked_count = static_cast<int32_t>(static_cast<int64_t>(masked_.size()) - packed.masked);
}

}  // namespace lockstep::cuda

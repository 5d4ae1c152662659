// What the host tells the sampling kernels about one task, and what they answer. Plain data, copied as it stands.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

// Where TEMPERATURE's y comes from, for T other than 1 (a trainer's choice; the draw always takes x / T).
enum class TemperatureRounding : int32_t {
  kDivide,          // fp32 x / T: PyTorch, T a tensor
  kReciprocal,      // fp32 x * (1 / T): PyTorch on a GPU, T a Python number
  kReciprocalBf16,  // the same on bf16 logits: rounded to bf16
};

// Bits of DeviceTask::flags.
enum SampleFlags : uint32_t {
  kSampleRaw = 1u << 0,              // RAW's sum
  kSampleTemperature = 1u << 1,      // TEMPERATURE's, for T other than 1
  kSampleProcessed = 1u << 2,        // the distribution drawn from, for a draw or for its log-probability
  kSampleGreedy = 1u << 3,           // T = 0
  kSampleListRaw = 1u << 4,          // the most probable tokens: by logit
  kSampleListTemperature = 1u << 5,  // by TEMPERATURE's y, for T other than 1
  kSampleListProcessed = 1u << 6,    // of the tokens kept
};

enum SampleList { kListRaw, kListTemperature, kListProcessed, kSampleLists };

// A token of the prompt or generated, of a task with a penalty.
struct TokenPenalty {
  int32_t token = 0;
  int32_t generated = 0;  // times; penalised for it where above 0
};

struct TokenBias {
  int32_t token = 0;
  float bias = 0;
};

struct alignas(16) DeviceTask {
  int32_t row = 0;     // of the logits
  int32_t token = -1;  // the token to score; -1: draw
  uint32_t flags = 0;
  int32_t top_k = 0;  // 0: off
  float temperature = 1.0f;
  float inverse = 1.0f;  // 1 / temperature, rounded
  float min_p = 0.0f;
  int32_t list_size = 0;
  uint64_t top_p = 0;         // in units of 2^-48, rounded up; 0: off
  uint64_t draw = 0;          // in units of 2^-53, odd
  float* adjusted = nullptr;  // [vocab up to a multiple of 8] logits after the edits; null: nothing changes the row's
  uint64_t* lists = nullptr;  // [kSampleLists, list_size]: fp32 bits of the value << 32 | token, in no order
  uint8_t* kept = nullptr;    // [KeptBytes(vocab)]: a bit a token; null: not asked for
  // What `adjusted` differs in: the request's, the same at every step (token_lists.h), ...
  const uint32_t* allowed = nullptr;  // [KeptBytes(vocab) / 4]: a bit a token, those without are masked; null: all
  const TokenBias* biases = nullptr;  // [bias_count], ascending
  // ... and the step's.
  const TokenPenalty* penalties = nullptr;  // [penalty_count], a token at most once
  const int32_t* masked = nullptr;          // [masked_count] tokens
  int32_t bias_count = 0;
  int32_t penalty_count = 0;
  int32_t masked_count = 0;
  float repetition_penalty = 1.0f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
};

constexpr int64_t KeptBytes(int64_t vocab) {
  return (vocab + 255) / 256 * 32;
}

enum class SampleStatus : int32_t {
  kOk,
  kLogitNotFinite,     // NaN or +inf in the row
  kRowEmpty,           // every logit is -inf
  kScaledNotFinite,    // logit / T overflows
  kAdjustedNotFinite,  // after penalties, bias and temperature
  kNothingLeft,        // every token is masked
};

struct alignas(16) DeviceResult {
  SampleStatus status = SampleStatus::kOk;
  int32_t token = 0;    // drawn or scored; where not finite: the lowest such token
  int32_t argmax = -1;  // greedy
  float bad_value = 0;  // where not finite: what was found
  float logit = 0;      // of the token
  float max_logit = 0;
  float log_sum_raw = 0;  // logf(sum of expf(x - max)), in PyTorch's order
  float log_sum_temperature = 0;
  float processed = 0;  // the token's y, -inf if it was dropped
  float max_processed = 0;
  uint64_t mass = 0;  // total of the tokens kept
  int32_t list_counts[kSampleLists] = {};
  int32_t reserved = 0;
};

}  // namespace lockstep::cuda

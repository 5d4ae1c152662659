// Sampling parameters of one request, in the worker's own types, and their limits. proto/lockstep/v1/rollout.proto
// documents the meaning of each for clients; sampler/README.md the formulas and the order in which they apply.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace lockstep {

inline constexpr int kMaxTopLogprobs = 64;
// Lower temperatures could overflow logits / T; 0 is the exact limit.
inline constexpr float kMinTemperature = 1e-4f;
inline constexpr float kMaxTemperature = 1e4f;
inline constexpr float kMaxAbsLogitBias = 100.0f;
inline constexpr float kMinRepetitionPenalty = 0.01f;
inline constexpr float kMaxRepetitionPenalty = 100.0f;
inline constexpr float kMaxAbsPenalty = 100.0f;  // presence, frequency
inline constexpr int64_t kMaxLogitBiasEntries = 16384;
inline constexpr int64_t kMaxAllowedTokenIds = 262144;
inline constexpr int64_t kMaxBadWords = 4096;
inline constexpr int64_t kMaxBadWordLength = 64;
inline constexpr int64_t kMaxStopTokenIds = 4096;  // eos_token_ids too

struct SamplingParams {
  float temperature = 1.0f;  // 0 is greedy; else [kMinTemperature, kMaxTemperature]
  float top_p = 1.0f;        // (0, 1]
  int32_t top_k = 0;         // 0: off
  float min_p = 0.0f;        // [0, 1)
  uint64_t seed = 0;

  std::map<int32_t, float> logit_bias;          // token id -> added to its logit
  std::vector<int32_t> allowed_token_ids;       // empty: all
  std::vector<std::vector<int32_t>> bad_words;  // token sequences that must not be completed
  float repetition_penalty = 1.0f;              // > 0; over prompt and generated tokens
  float presence_penalty = 0.0f;                // over generated tokens
  float frequency_penalty = 0.0f;               // over generated tokens

  int64_t min_tokens = 0;  // stop tokens and eos are masked until this many are generated
  std::vector<int32_t>
      stop_token_ids;                  // stop after one of these (they are included); also used for the min_tokens mask
  std::vector<int32_t> eos_token_ids;  // the model's, unless ignore_eos
};

struct LogprobOptions {
  bool raw = false;          // log_softmax(logits)
  bool temperature = false;  // log_softmax(logits / T); T = 0 counts as 1
  bool processed = false;    // of the distribution sampled from; 0 for greedy
  // The k most probable tokens with their logprobs, of each kind asked for; 0 to kMaxTopLogprobs.
  int32_t top_k = 0;
  bool kept_token_ids = false;  // the ids the filters kept
};

// Whether any penalty needs TokenHistory's counts.
bool NeedsCounts(const SamplingParams& params);

// Checks every field against `vocab_size` and its range. INVALID_ARGUMENT "sampling.FIELD: value V is out of range;
// want ...".
absl::Status ValidateSamplingParams(const SamplingParams& params, int64_t vocab_size);
// Of a sample that has `generated` tokens: INVALID_ARGUMENT if its masks leave no token to draw next. What bad_words of
// several tokens forbid depends on what is drawn and does not count.
absl::Status CheckSomeTokenIsLeft(const SamplingParams& params, int64_t vocab_size, int64_t generated);
// As ValidateSamplingParams, of "logprobs.FIELD".
absl::Status ValidateLogprobOptions(const LogprobOptions& options);

}  // namespace lockstep

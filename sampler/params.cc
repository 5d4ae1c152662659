#include "sampler/params.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

template <class T>
absl::Status OutOfRange(const std::string& field, T value, const std::string& want) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": value ", value, " is out of range; want ", want));
}

// Written so that a NaN fails.
absl::Status CheckClosed(const std::string& field, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return OutOfRange(field, value, absl::StrCat(low, " to ", high));
}

absl::Status CheckTokenId(const std::string& field, int32_t id, int64_t vocab_size) {
  if (id >= 0 && id < vocab_size) return absl::OkStatus();
  return OutOfRange(field, id, absl::StrCat("a token id, 0 to ", vocab_size - 1));
}

absl::Status CheckSize(const std::string& field, size_t size, int64_t limit) {
  if (static_cast<int64_t>(size) <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", size, " entries; want at most ", limit));
}

absl::Status CheckTokenIds(const std::string& field, const std::vector<int32_t>& ids, int64_t limit,
                           int64_t vocab_size) {
  LOCKSTEP_RETURN_IF_ERROR(CheckSize(field, ids.size(), limit));
  for (size_t i = 0; i < ids.size(); ++i) {
    LOCKSTEP_RETURN_IF_ERROR(CheckTokenId(absl::StrCat(field, "[", i, "]"), ids[i], vocab_size));
  }
  return absl::OkStatus();
}

absl::Status CheckLogitBias(const std::map<int32_t, float>& logit_bias, int64_t vocab_size) {
  LOCKSTEP_RETURN_IF_ERROR(CheckSize("sampling.logit_bias", logit_bias.size(), kMaxLogitBiasEntries));
  for (const auto& [token, bias] : logit_bias) {
    LOCKSTEP_RETURN_IF_ERROR(CheckTokenId("sampling.logit_bias key", token, vocab_size));
    LOCKSTEP_RETURN_IF_ERROR(
        CheckClosed(absl::StrCat("sampling.logit_bias[", token, "]"), bias, -kMaxAbsLogitBias, kMaxAbsLogitBias));
  }
  return absl::OkStatus();
}

absl::Status CheckBadWords(const std::vector<std::vector<int32_t>>& bad_words, int64_t vocab_size) {
  LOCKSTEP_RETURN_IF_ERROR(CheckSize("sampling.bad_words", bad_words.size(), kMaxBadWords));
  for (size_t i = 0; i < bad_words.size(); ++i) {
    const std::string field = absl::StrCat("sampling.bad_words[", i, "]");
    if (bad_words[i].empty()) return absl::InvalidArgumentError(absl::StrCat(field, ": empty; want at least 1 token"));
    LOCKSTEP_RETURN_IF_ERROR(CheckTokenIds(field, bad_words[i], kMaxBadWordLength, vocab_size));
  }
  return absl::OkStatus();
}

}  // namespace

bool NeedsCounts(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
}

absl::Status ValidateSamplingParams(const SamplingParams& params, int64_t vocab_size) {
  const float t = params.temperature;
  if (!(t == 0.0f || (t >= kMinTemperature && t <= kMaxTemperature))) {
    return OutOfRange("sampling.temperature", t, absl::StrCat("0, or ", kMinTemperature, " to ", kMaxTemperature));
  }
  if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) return OutOfRange("sampling.top_p", params.top_p, "(0, 1]");
  if (params.top_k < 0) return OutOfRange("sampling.top_k", params.top_k, "0 (off) or more");
  if (!(params.min_p >= 0.0f && params.min_p < 1.0f)) return OutOfRange("sampling.min_p", params.min_p, "[0, 1)");
  LOCKSTEP_RETURN_IF_ERROR(CheckLogitBias(params.logit_bias, vocab_size));
  LOCKSTEP_RETURN_IF_ERROR(
      CheckTokenIds("sampling.allowed_token_ids", params.allowed_token_ids, kMaxAllowedTokenIds, vocab_size));
  LOCKSTEP_RETURN_IF_ERROR(CheckBadWords(params.bad_words, vocab_size));
  LOCKSTEP_RETURN_IF_ERROR(CheckClosed("sampling.repetition_penalty", params.repetition_penalty, kMinRepetitionPenalty,
                                       kMaxRepetitionPenalty));
  LOCKSTEP_RETURN_IF_ERROR(
      CheckClosed("sampling.presence_penalty", params.presence_penalty, -kMaxAbsPenalty, kMaxAbsPenalty));
  LOCKSTEP_RETURN_IF_ERROR(
      CheckClosed("sampling.frequency_penalty", params.frequency_penalty, -kMaxAbsPenalty, kMaxAbsPenalty));
  if (params.min_tokens < 0) return OutOfRange("sampling.min_tokens", params.min_tokens, "0 or more");
  LOCKSTEP_RETURN_IF_ERROR(
      CheckTokenIds("sampling.stop_token_ids", params.stop_token_ids, kMaxStopTokenIds, vocab_size));
  return CheckTokenIds("sampling.eos_token_ids", params.eos_token_ids, kMaxStopTokenIds, vocab_size);
}

absl::Status CheckSomeTokenIsLeft(const SamplingParams& params, int64_t vocab_size, int64_t generated) {
  const bool ends_masked = generated < params.min_tokens;
  std::set<int32_t> masked;
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (word.size() == 1) masked.insert(word[0]);
  }
  if (ends_masked) {
    masked.insert(params.stop_token_ids.begin(), params.stop_token_ids.end());
    masked.insert(params.eos_token_ids.begin(), params.eos_token_ids.end());
  }
  const std::vector<int32_t>& allowed = params.allowed_token_ids;
  const bool left = allowed.empty() ? static_cast<int64_t>(masked.size()) < vocab_size
                                    : std::any_of(allowed.begin(), allowed.end(),
                                                  [&](int32_t token) { return !masked.contains(token); });
  if (left) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("sampling.allowed_token_ids: none of ",
                                                 allowed.empty() ? vocab_size : static_cast<int64_t>(allowed.size()),
                                                 " tokens may be drawn: bad_words of one token",
                                                 ends_masked ? ", and eos and stop_token_ids before min_tokens," : "",
                                                 " mask them all; want at least one that is left"));
}

absl::Status ValidateLogprobOptions(const LogprobOptions& options) {
  if (options.top_k < 0 || options.top_k > kMaxTopLogprobs) {
    return OutOfRange("logprobs.top_k", options.top_k, absl::StrCat("0 to ", kMaxTopLogprobs));
  }
  if (options.top_k > 0 && !options.raw && !options.temperature && !options.processed) {
    return absl::InvalidArgumentError(absl::StrCat("logprobs.top_k: value ", options.top_k,
                                                   " with no kind of log-probability asked for; want 0, or one of raw, "
                                                   "temperature and processed"));
  }
  return absl::OkStatus();
}

}  // namespace lockstep

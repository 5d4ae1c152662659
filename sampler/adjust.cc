#include "sampler/adjust.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

bool StopTokensMasked(const SamplingParams& params, const TokenHistory& history) {
  return history.generated() < params.min_tokens && !(params.eos_token_ids.empty() && params.stop_token_ids.empty());
}

// Whether the tokens so far end in all of `words` but the last.
bool WouldComplete(std::span<const int32_t> tokens, std::span<const int32_t> words) {
  const std::span<const int32_t> before = words.first(words.size() - 1);
  return before.size() <= tokens.size() && std::equal(before.begin(), before.end(), tokens.end() - before.size());
}

void Penalize(const SamplingParams& params, const TokenHistory& history, std::span<float> row) {
  LOCKSTEP_CHECK(history.tokens().empty() || !history.counts().empty(),
                 "a penalty is on, but the TokenHistory was built without counts");
  for (const TokenHistory::Count& count : history.counts()) {
    LOCKSTEP_CHECK(count.token >= 0 && count.token < static_cast<int64_t>(row.size()), "token {} in a vocabulary of {}",
                   count.token, row.size());
    float logit = row[count.token];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (count.generated > 0) {
      logit -= params.frequency_penalty * static_cast<float>(count.generated);
      logit -= params.presence_penalty;
    }
    row[count.token] = logit;
  }
}

void KeepAllowed(const std::vector<int32_t>& allowed, std::span<float> row) {
  std::vector<float> logits(allowed.size());
  for (size_t i = 0; i < allowed.size(); ++i) logits[i] = row[allowed[i]];
  std::fill(row.begin(), row.end(), kMasked);
  for (size_t i = 0; i < allowed.size(); ++i) row[allowed[i]] = logits[i];
}

}  // namespace

bool HasAdjustments(const SamplingParams& params, const TokenHistory& history) {
  return NeedsCounts(params) || !params.logit_bias.empty() || !params.allowed_token_ids.empty() ||
         !params.bad_words.empty() || StopTokensMasked(params, history);
}

void AdjustLogits(const SamplingParams& params, const TokenHistory& history, std::span<float> row) {
  if (NeedsCounts(params)) Penalize(params, history, row);
  for (const auto& [token, bias] : params.logit_bias) row[token] += bias;
  if (!params.allowed_token_ids.empty()) KeepAllowed(params.allowed_token_ids, row);
  for (const std::vector<int32_t>& words : params.bad_words) {
    if (WouldComplete(history.tokens(), words)) row[words.back()] = kMasked;
  }
  if (StopTokensMasked(params, history)) {
    for (const int32_t token : params.eos_token_ids) row[token] = kMasked;
    for (const int32_t token : params.stop_token_ids) row[token] = kMasked;
  }
}

std::string DescribeMasks(const SamplingParams& params, const TokenHistory& history) {
  std::string masks;
  if (!params.allowed_token_ids.empty()) {
    absl::StrAppend(&masks, "allowed_token_ids leaves ", params.allowed_token_ids.size(), " tokens; ");
  }
  const int64_t bad = std::count_if(params.bad_words.begin(), params.bad_words.end(),
                                    [&](const auto& words) { return WouldComplete(history.tokens(), words); });
  if (bad > 0) absl::StrAppend(&masks, "bad_words forbids ", bad, " here; ");
  if (StopTokensMasked(params, history)) {
    absl::StrAppend(&masks, "min_tokens masks ", params.eos_token_ids.size(), " eos and ", params.stop_token_ids.size(),
                    " stop tokens until ", params.min_tokens, " are generated (", history.generated(), " so far); ");
  }
  return absl::StrCat(masks, "the remaining logits are -inf");
}

}  // namespace lockstep

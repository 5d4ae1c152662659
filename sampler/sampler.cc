#include "sampler/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"
#include "sampler/adjust.h"
#include "sampler/filters.h"
#include "sampler/logsumexp.h"
#include "sampler/mass.h"
#include "sampler/row_ops.h"

namespace lockstep {
namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

// A row and, where one is needed, its softmax.
struct Distribution {
  std::span<const float> row;
  Softmax softmax;
};

struct Distributions {
  Distribution raw;
  Distribution temperature;
  Distribution processed;  // for greedy, only the row
  int32_t argmax = -1;     // greedy's token
};

absl::Status NotFinite(std::span<const float> row, const std::string& what) {
  const auto bad =
      std::find_if(row.begin(), row.end(), [](float x) { return !(x <= std::numeric_limits<float>::max()); });
  return absl::InternalError(
      absl::StrCat(what, " of token ", bad - row.begin(), " is ", *bad, "; want finite or -inf"));
}

float DivisorOf(const SamplingParams& params) {
  return params.temperature == 0.0f ? 1.0f : params.temperature;
}

// Fills scratch.processed with the adjusted logits over T; returns their maximum.
absl::StatusOr<float> AdjustAndScale(std::span<const float> logits, const SamplingParams& params,
                                     const TokenHistory& history, SamplerScratch& scratch) {
  scratch.processed.assign(logits.begin(), logits.end());
  AdjustLogits(params, history, scratch.processed);
  if (DivisorOf(params) != 1.0f) DivideRow(scratch.processed, DivisorOf(params), scratch.processed.data());
  const RowRange range = FindRange(scratch.processed);
  if (!range.valid)
    return NotFinite(scratch.processed, "sampling: the logit after penalties, logit_bias and temperature");
  if (range.max == kImpossible) {
    return absl::FailedPreconditionError(
        absl::StrCat("sampling: no token is left to draw from: ", DescribeMasks(params, history)));
  }
  return range.max;
}

// Everything that `options` and, if `with_processed`, a draw need. On return scratch.weights and .block_mass belong to
// the processed row.
absl::Status Compute(std::span<const float> logits, const SamplingParams& params, const LogprobOptions& options,
                     const TokenHistory& history, bool with_processed, SamplerScratch& scratch, Distributions& out) {
  LOCKSTEP_CHECK(!logits.empty() && static_cast<int64_t>(logits.size()) <= kMaxVocabSize,
                 "a row of {} logits; want 1 to {}", logits.size(), kMaxVocabSize);
  const RowRange range = FindRange(logits);
  if (!range.valid) return NotFinite(logits, "logits: the logit");
  if (range.max == kImpossible) {
    return absl::FailedPreconditionError(absl::StrCat("logits: all ", logits.size(), " are -inf"));
  }

  const bool greedy = params.temperature == 0.0f;
  const bool scaled = DivisorOf(params) != 1.0f;
  const bool adjusted = with_processed && HasAdjustments(params, history);
  const bool filtered = with_processed && !greedy && HasFilters(params, static_cast<int64_t>(logits.size()));

  out.raw.row = logits;
  const bool raw_softmax = options.raw || (options.temperature && !scaled);
  if (raw_softmax) out.raw.softmax = ComputeSoftmax(logits, range.max, scratch.weights, scratch.block_mass);

  out.temperature = out.raw;
  float max = range.max;
  if (scaled && (options.temperature || (with_processed && !adjusted))) {
    // Division rounds monotonically: the largest logit has the largest quotient.
    max /= params.temperature;
    scratch.scaled.resize(logits.size());
    DivideRow(logits, params.temperature, scratch.scaled.data());
    if (max == kImpossible) {
      return absl::FailedPreconditionError("sampling.temperature: every logit / temperature is -inf: no token is left");
    }
    if (!std::isfinite(max)) return NotFinite(scratch.scaled, "sampling.temperature: logit / temperature");
    out.temperature.row = scratch.scaled;
    if (options.temperature) {
      out.temperature.softmax = ComputeSoftmax(scratch.scaled, max, scratch.weights, scratch.block_mass);
    }
  }
  if (!with_processed) return absl::OkStatus();

  out.processed = out.temperature;
  if (adjusted) {
    LOCKSTEP_ASSIGN_OR_RETURN(max, AdjustAndScale(logits, params, history, scratch));
    out.processed.row = scratch.processed;
  }
  if (greedy) {
    out.argmax = static_cast<int32_t>(FindFirst(out.processed.row, max));
    return absl::OkStatus();
  }
  if (filtered) {
    if (!adjusted) scratch.processed.assign(out.temperature.row.begin(), out.temperature.row.end());
    ApplyFilters(params, max, scratch.processed, scratch);
    out.processed.row = scratch.processed;
  }
  // Without adjustments or filters this is the distribution above, computed last if at all.
  const bool have_softmax = !adjusted && !filtered && (scaled ? options.temperature : raw_softmax);
  if (!have_softmax)
    out.processed.softmax = ComputeSoftmax(out.processed.row, max, scratch.weights, scratch.block_mass);
  return absl::OkStatus();
}

// Inverse CDF over ascending token ids: the first token at which the mass so far exceeds floor(u * total).
int32_t Draw(uint64_t total, double u, const SamplerScratch& scratch) {
  const auto multiple = static_cast<uint64_t>(u * 0x1p53);  // exact
  auto rest = static_cast<uint64_t>((static_cast<unsigned __int128>(multiple) * total) >> 53);
  size_t block = 0;
  while (rest >= scratch.block_mass[block]) rest -= scratch.block_mass[block++];
  size_t token = block * kMassBlock;
  for (uint64_t mass; rest >= (mass = Mass(scratch.weights[token])); ++token) rest -= mass;
  return static_cast<int32_t>(token);
}

std::vector<TokenLogprob> MostProbable(const Distribution& distribution, int32_t k, SamplerScratch& scratch) {
  std::vector<TokenLogprob> most_probable;
  if (k == 0) return most_probable;
  SelectTopK(distribution.row, k, scratch.keys);
  for (const TokenKey key : scratch.keys) {
    most_probable.push_back({.token = KeyToken(key), .logprob = distribution.softmax.LogProb(KeyLogit(key))});
  }
  // Different logits may have the same log-probability once that is rounded; what is returned is in order of what is
  // returned.
  std::sort(most_probable.begin(), most_probable.end(), [](const TokenLogprob& a, const TokenLogprob& b) {
    return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
  });
  return most_probable;
}

std::vector<int32_t> KeptTokens(std::span<const float> row) {
  std::vector<int32_t> kept;
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i] != kImpossible) kept.push_back(static_cast<int32_t>(i));
  }
  return kept;
}

RowLogprobs Report(const Distributions& distributions, int32_t token, const SamplingParams& params,
                   const LogprobOptions& options, SamplerScratch& scratch) {
  RowLogprobs logprobs;
  const auto report = [&](const Distribution& distribution, float& logprob, std::vector<TokenLogprob>& top) {
    logprob = distribution.softmax.LogProb(distribution.row[token]);
    top = MostProbable(distribution, options.top_k, scratch);
  };
  if (options.raw) report(distributions.raw, logprobs.raw, logprobs.top_raw);
  if (options.temperature) report(distributions.temperature, logprobs.temperature, logprobs.top_temperature);
  if (params.temperature == 0.0f) {
    if (options.processed) {
      logprobs.processed = token == distributions.argmax ? 0.0f : kImpossible;
      if (options.top_k > 0) logprobs.top_processed = {{.token = distributions.argmax, .logprob = 0.0f}};
    }
    if (options.kept_token_ids) logprobs.kept_token_ids = {distributions.argmax};
  } else {
    if (options.processed) report(distributions.processed, logprobs.processed, logprobs.top_processed);
    if (options.kept_token_ids) logprobs.kept_token_ids = KeptTokens(distributions.processed.row);
  }
  return logprobs;
}

}  // namespace

absl::StatusOr<SampledToken> SampleRow(std::span<const float> logits, const SamplingParams& params,
                                       const LogprobOptions& options, const TokenHistory& history, const DrawKey& key,
                                       SamplerScratch& scratch) {
  Distributions distributions;
  LOCKSTEP_RETURN_IF_ERROR(Compute(logits, params, options, history, /*with_processed=*/true, scratch, distributions));
  const int32_t token = params.temperature == 0.0f
                            ? distributions.argmax
                            : Draw(distributions.processed.softmax.total, UniformDraw(key), scratch);
  return SampledToken{.token = token, .logprobs = Report(distributions, token, params, options, scratch)};
}

absl::StatusOr<RowLogprobs> ScoreRow(std::span<const float> logits, int32_t token, const SamplingParams& params,
                                     const LogprobOptions& options, const TokenHistory& history,
                                     SamplerScratch& scratch) {
  LOCKSTEP_CHECK(token >= 0 && token < static_cast<int64_t>(logits.size()), "token {} in a vocabulary of {}", token,
                 logits.size());
  Distributions distributions;
  LOCKSTEP_RETURN_IF_ERROR(
      Compute(logits, params, options, history, options.processed || options.kept_token_ids, scratch, distributions));
  return Report(distributions, token, params, options, scratch);
}

}  // namespace lockstep

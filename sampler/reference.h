// What a sampler must do, written a second time: straight from the formulas, in double, sorting everything. Only tests
// use it. Each rule can be broken on purpose, so that a test can show that it would notice.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sampler/params.h"
#include "sampler/sampler.h"

namespace lockstep {

enum class Mutation {
  kNone,
  kTopKOneMore,
  kTopKOneLess,
  kTopPExcludesCrossing,    // keeps only tokens that end below top_p
  kTopPOneMore,             // keeps one token past the crossing
  kTopPOverFullVocabulary,  // cumulates probabilities not renormalised after top_k
  kMinPUnnormalised,        // p >= min_p instead of p >= min_p * p_max
  kMinPOfSecond,            // relative to the second most probable token
  kTiesToHighestId,
  kTiesAllKept,  // top_k keeps everything equal to the k-th
  kTopPBeforeTopK,
  kTemperatureAfterFilters,  // filters look at T = 1
  kTemperatureMultiplies,
  kTemperatureIgnored,
  kRepetitionInverted,
  kRepetitionAlwaysDivides,
  kRepetitionIgnoresPrompt,
  kRepetitionIgnoresGenerated,
  kFrequencyAdds,
  kFrequencyIgnoresCount,
  kPresenceAdds,
  kPresenceCountsPrompt,
  kBiasSubtracts,
  kBiasAfterTemperature,
  kBiasBeforeRepetition,
  kAllowedInverted,
  kBadWordsIgnorePrefix,   // masks the last token wherever it stands
  kBadWordsGeneratedOnly,  // does not see the prompt's tail
  kBadWordsIgnored,
  kMinTokensOneLess,
  kMinTokensOneMore,
  kMinTokensEosOnly,
  kPenaltiesAfterTemperature,
};

struct ReferenceResult {
  std::vector<double>
      probabilities;  // [vocab]; 0 for what is masked or dropped; all 0 if everything is. Greedy: 1 for its token
  // Smallest relative distance of a top_p or min_p decision from falling the other way; another correct program may
  // differ where this is in the range of rounding errors.
  double margin = 1;
  double max_abs_logit = 0;  // of the adjusted logits over T, for tolerances
};

ReferenceResult ReferenceDistribution(std::span<const float> logits, const SamplingParams& params,
                                      const TokenHistory& history, Mutation mutation = Mutation::kNone);

// Inverse CDF over ascending ids. `clearance`: how far u is from the nearest boundary.
int32_t ReferenceDraw(const std::vector<double>& probabilities, double u, double* clearance);

// ln softmax of logits / divisor.
std::vector<double> ReferenceLogSoftmax(std::span<const float> logits, double divisor);

}  // namespace lockstep

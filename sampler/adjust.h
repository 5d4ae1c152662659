// What changes logits before the temperature: penalties, logit_bias and masks.
#pragma once

#include <span>
#include <string>

#include "sampler/params.h"
#include "sampler/sampler.h"

namespace lockstep {

// Whether AdjustLogits would change anything at this position.
bool HasAdjustments(const SamplingParams& params, const TokenHistory& history);

// In place, in this order: repetition penalty, frequency and presence penalty, logit_bias, masks (-inf). row: [vocab],
// logits.
void AdjustLogits(const SamplingParams& params, const TokenHistory& history, std::span<float> row);

// For the error when nothing is left: the masks that act at this position, with their sizes.
std::string DescribeMasks(const SamplingParams& params, const TokenHistory& history);

}  // namespace lockstep

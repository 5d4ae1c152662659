// Which tokens are left to draw from: top_k, top_p, min_p. All three work on the logits after the temperature.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sampler/params.h"
#include "sampler/sampler.h"
#include "sampler/token_key.h"

namespace lockstep {

// The keys of the k most probable tokens, in no order; fewer where fewer logits are above -inf. k >= 1.
void SelectTopK(std::span<const float> row, int64_t k, std::vector<TokenKey>& keys);

bool HasFilters(const SamplingParams& params, int64_t vocab_size);

// Sets the logits of the tokens that the filters drop to -inf. row: [vocab], logits / T; max: its maximum, finite (that
// token always stays). Overwrites scratch.keys, .weights and .block_mass.
void ApplyFilters(const SamplingParams& params, float max, std::span<float> row, SamplerScratch& scratch);

}  // namespace lockstep

#include "sampler/filters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "rollout/base/check.h"
#include "sampler/logsumexp.h"
#include "sampler/mass.h"
#include "sampler/row_ops.h"

namespace lockstep {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

// Keeps the tokens that rank up to and including `last`.
void DropAfter(TokenKey last, std::span<float> row) {
  const float logit = KeyLogit(last);
  DropBelow(row, logit);
  int64_t i = KeyToken(last) + 1;
  while ((i += FindFirst(row.subspan(i), logit)) < static_cast<int64_t>(row.size())) row[i++] = kDropped;
}

uint64_t TotalMass(std::span<const TokenKey> keys, const std::vector<float>& weights) {
  uint64_t total = 0;
  for (const TokenKey key : keys) total += Mass(weights[KeyToken(key)]);
  return total;
}

// ceil(top_p * total) in exact arithmetic. In units of 2^-48 every fp32 top_p from 2^-18 on is an integer; below that
// the result is at most total * 2^-18, which the most probable token alone has.
uint64_t NeededMass(float top_p, uint64_t total) {
  const auto p = static_cast<uint64_t>(std::ceil(std::ldexp(static_cast<double>(top_p), 48)));
  const unsigned __int128 product = static_cast<unsigned __int128>(p) * total;
  return static_cast<uint64_t>((product + ((uint64_t{1} << 48) - 1)) >> 48);
}

// The key at which the mass, added up in rank order, reaches `needed`: quickselect by mass. TotalMass(keys) >= needed
// >= 1. Reorders keys.
TokenKey FindCrossing(std::span<TokenKey> keys, const std::vector<float>& weights, uint64_t needed) {
  constexpr size_t kSortBelow = 64;
  while (keys.size() > kSortBelow) {
    const size_t half = keys.size() / 2;
    std::nth_element(keys.begin(), keys.begin() + half, keys.end());
    const uint64_t mass = TotalMass(keys.first(half), weights);
    if (mass >= needed) {
      keys = keys.first(half);
    } else {
      needed -= mass;
      keys = keys.subspan(half);
    }
  }
  std::sort(keys.begin(), keys.end());
  for (const TokenKey key : keys) {
    const uint64_t mass = Mass(weights[KeyToken(key)]);
    if (mass >= needed) return key;
    needed -= mass;
  }
  LOCKSTEP_CHECK(false, "the tokens' mass is {} short of what top_p needs", needed);
  return 0;
}

// The same over a whole row: the bin is found by its mass, and only that bin's tokens are ranked.
TokenKey FindCrossing(std::span<const float> row, float max, uint64_t needed, SamplerScratch& scratch) {
  std::array<uint64_t, kBins> bin_mass;
  BinMasses(row, max, scratch.weights.data(), bin_mass);
  int bin = 0;
  while (bin < kBins && bin_mass[bin] < needed) needed -= bin_mass[bin++];
  LOCKSTEP_CHECK(bin < kBins, "the row's mass is {} short of what top_p needs", needed);
  scratch.keys.clear();
  AppendBin(row, max, bin, scratch.keys);
  return FindCrossing(scratch.keys, scratch.weights, needed);
}

}  // namespace

void SelectTopK(std::span<const float> row, int64_t k, std::vector<TokenKey>& keys) {
  keys.clear();
  const size_t wanted = static_cast<size_t>(k);
  const size_t capacity = 2 * wanted + 256;
  float threshold = kDropped;
  for (int64_t i = 0; i < static_cast<int64_t>(row.size());) {
    i = AppendKeys(row, i, threshold, capacity, keys);
    if (keys.size() > wanted) {
      std::nth_element(keys.begin(), keys.begin() + wanted - 1, keys.end());
      keys.resize(wanted);
      // Ids ascend: whatever comes later with the same logit ranks lower than what is already here.
      threshold = KeyLogit(keys.back());
    }
  }
}

bool HasFilters(const SamplingParams& params, int64_t vocab_size) {
  return (params.top_k > 0 && params.top_k < vocab_size) || params.top_p < 1.0f || params.min_p > 0.0f;
}

void ApplyFilters(const SamplingParams& params, float max, std::span<float> row, SamplerScratch& scratch) {
  const bool by_rank = params.top_k > 0 && params.top_k < static_cast<int64_t>(row.size());
  const bool by_mass = params.top_p < 1.0f;
  Softmax softmax;
  if (by_mass || params.min_p > 0.0f) softmax = ComputeSoftmax(row, max, scratch.weights, scratch.block_mass);

  if (by_rank) SelectTopK(row, params.top_k, scratch.keys);
  if (by_rank && by_mass) {
    const uint64_t needed = NeededMass(params.top_p, TotalMass(scratch.keys, scratch.weights));
    DropAfter(FindCrossing(scratch.keys, scratch.weights, needed), row);
  } else if (by_rank) {
    DropAfter(*std::max_element(scratch.keys.begin(), scratch.keys.end()), row);
  } else if (by_mass) {
    DropAfter(FindCrossing(row, max, NeededMass(params.top_p, softmax.total), scratch), row);
  }

  if (params.min_p > 0.0f) {
    for (size_t i = 0; i < row.size(); ++i) {
      if (scratch.weights[i] < params.min_p) row[i] = kDropped;
    }
  }
}

}  // namespace lockstep

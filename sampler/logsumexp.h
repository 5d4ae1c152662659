// Softmax of a row in the sampler's fixed-point mass (mass.h), and log-probabilities from it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lockstep {

// ln of an integer >= 1 of at most 62 bits, relative to `units`: ln(value / units). Correct to a few ulps of a double,
// by IEEE +, -, *, / only: the C library's log may differ between machines.
double LogRatio(uint64_t value, double units);

struct Softmax {
  float max = 0;
  uint64_t total = 0;    // mass of all tokens
  double log_total = 0;  // ln(total / kMassUnits) >= 0

  // ln p of a token with this logit: one rounding, to fp32. -inf for -inf.
  float LogProb(float logit) const {
    return static_cast<float>((static_cast<double>(logit) - static_cast<double>(max)) - log_total);
  }
};

// `max`: the row's maximum, finite. Leaves the weights and the masses of blocks behind (see WeighRow).
Softmax ComputeSoftmax(std::span<const float> row, float max, std::vector<float>& weights,
                       std::vector<uint64_t>& block_mass);

}  // namespace lockstep

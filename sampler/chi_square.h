// Pearson's chi-square test with its level and power, for the sampler's tests.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep {

// P(X >= statistic) for X chi-square distributed with `degrees` degrees of freedom.
double ChiSquareTail(double statistic, int degrees);

// p-value of `counts` under `probabilities` (same length). Cells with an expectation under 10 are pooled. 0 if anything
// was counted where the probability is 0.
double ChiSquarePValue(const std::vector<int64_t>& counts, const std::vector<double>& probabilities);

// Probability that `draws` draws from `truth` reject `hypothesis` at `level`: by the noncentral chi-square
// distribution, as a normal one (its mean and variance), or by drawing anything that the hypothesis calls impossible.
double ChiSquarePower(const std::vector<double>& truth, const std::vector<double>& hypothesis, int64_t draws,
                      double level);

}  // namespace lockstep

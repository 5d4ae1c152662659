#include "sampler/logsumexp.h"

#include <cmath>

#include "sampler/mass.h"
#include "sampler/row_ops.h"

namespace lockstep {

double LogRatio(uint64_t value, double units) {
  int exponent = 0;
  double mantissa = std::frexp(static_cast<double>(value) / units, &exponent);  // [1/2, 1)
  if (mantissa < 0x1.6a09e667f3bcdp-1) {                                        // sqrt(1/2)
    mantissa *= 2;
    --exponent;
  }
  // ln m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1); |s| < 0.1716, so s^23/23 is below 2^-62 of
  // s.
  const double s = (mantissa - 1) / (mantissa + 1);
  const double s2 = s * s;
  double series = 0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * s2;
  const double log_mantissa = 2 * (s + s * series);
  constexpr double kLn2High = 0x1.62e42fefa38p-1;  // 42 bits: exponent * kLn2High is exact
  constexpr double kLn2Low = 0x1.ef35793c7673p-45;
  return exponent * kLn2High + (exponent * kLn2Low + log_mantissa);
}

Softmax ComputeSoftmax(std::span<const float> row, float max, std::vector<float>& weights,
                       std::vector<uint64_t>& block_mass) {
  weights.resize(row.size());
  block_mass.resize(MassBlocks(static_cast<int64_t>(row.size())));
  const uint64_t total = WeighRow(row, max, weights.data(), block_mass.data());
  return {.max = max, .total = total, .log_total = LogRatio(total, kMassUnits)};
}

}  // namespace lockstep

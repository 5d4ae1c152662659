#include "sampler/chi_square.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lockstep {
namespace {

constexpr double kMinExpected = 10;

// Regularised upper incomplete gamma function Q(a, x): series below a + 1, Lentz's continued fraction above (Abramowitz
// and Stegun 6.5.29, 6.5.31).
double UpperGamma(double a, double x) {
  if (x <= 0) return 1;
  const double front = std::exp(a * std::log(x) - x - std::lgamma(a));
  if (x < a + 1) {
    double term = 1 / a;
    double sum = term;
    for (int n = 1; n < 10000 && term > sum * 1e-16; ++n) sum += term *= x / (a + n);
    return 1 - front * sum;
  }
  constexpr double kTiny = 1e-300;
  double b = x + 1 - a;
  double c = 1 / kTiny;
  double d = 1 / b;
  double h = d;
  for (int n = 1; n < 10000; ++n) {
    const double numerator = -n * (n - a);
    b += 2;
    d = 1 / std::max(std::abs(numerator * d + b), kTiny);
    c = std::max(std::abs(b + numerator / c), kTiny);
    h *= d * c;
    if (std::abs(d * c - 1) < 1e-15) break;
  }
  return front * h;
}

// Cells of a hypothesis: pool[i] is the cell of category i, -1 where the probability is 0.
struct Cells {
  std::vector<int> of;
  std::vector<double> probabilities;
};

Cells Pool(const std::vector<double>& probabilities, double draws) {
  Cells cells;
  cells.of.assign(probabilities.size(), -1);
  int pooled = -1;
  for (size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] == 0) continue;
    const bool small = probabilities[i] * draws < kMinExpected;
    if (!small || pooled < 0) {
      cells.of[i] = static_cast<int>(cells.probabilities.size());
      cells.probabilities.push_back(0);
      if (small) pooled = cells.of[i];
    } else {
      cells.of[i] = pooled;
    }
    cells.probabilities[cells.of[i]] += probabilities[i];
  }
  return cells;
}

double Statistic(const std::vector<double>& observed, const std::vector<double>& probabilities, double draws) {
  double statistic = 0;
  for (size_t c = 0; c < observed.size(); ++c) {
    const double expected = probabilities[c] * draws;
    statistic += (observed[c] - expected) * (observed[c] - expected) / expected;
  }
  return statistic;
}

}  // namespace

double ChiSquareTail(double statistic, int degrees) {
  return UpperGamma(degrees / 2.0, statistic / 2);
}

double ChiSquarePValue(const std::vector<int64_t>& counts, const std::vector<double>& probabilities) {
  const auto draws = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  const Cells cells = Pool(probabilities, draws);
  std::vector<double> observed(cells.probabilities.size(), 0.0);
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0) continue;
    if (cells.of[i] < 0) return 0;
    observed[cells.of[i]] += static_cast<double>(counts[i]);
  }
  if (observed.size() < 2) return 1;
  return ChiSquareTail(Statistic(observed, cells.probabilities, draws), static_cast<int>(observed.size()) - 1);
}

double ChiSquarePower(const std::vector<double>& truth, const std::vector<double>& hypothesis, int64_t draws,
                      double level) {
  const auto n = static_cast<double>(draws);
  const Cells cells = Pool(hypothesis, n);
  std::vector<double> expected(cells.probabilities.size(), 0.0);
  double impossible = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (cells.of[i] < 0) {
      impossible += truth[i];
    } else {
      expected[cells.of[i]] += truth[i] * n;
    }
  }
  const double by_impossible = 1 - std::pow(1 - impossible, n);
  const int degrees = static_cast<int>(expected.size()) - 1;
  if (degrees < 1) return by_impossible;
  double low = 0;
  double high = 10.0 * degrees + 1000;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (ChiSquareTail(middle, degrees) > level ? low : high) = middle;
  }
  const double noncentrality = Statistic(expected, cells.probabilities, n);
  const double z = (degrees + noncentrality - high) / std::sqrt(2 * (degrees + 2 * noncentrality));
  return std::max(by_impossible, 0.5 * std::erfc(-z / std::sqrt(2.0)));
}

}  // namespace lockstep

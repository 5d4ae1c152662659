#include "tools/bench/step_samples.h"

#include <algorithm>

namespace lockstep {
namespace {

bool DecodeOnly(const StepLoad& step) {
  return step.prefill_rows == 0;
}

// Indices of the steps at which the sum of weight(step) passes the middles of `points` equal parts; ascending, each
// once. `weight` of a step that is not to be chosen is 0.
template <class Weight>
std::vector<int64_t> Spread(const std::vector<StepLoad>& steps, int64_t points, const Weight& weight) {
  double total = 0;
  for (const StepLoad& step : steps) total += weight(step);
  std::vector<int64_t> chosen;
  double sum = 0;
  int64_t next = 0;
  for (size_t i = 0; i < steps.size() && next < points; ++i) {
    const double w = weight(steps[i]);
    sum += w;
    if (w == 0 || sum < total * (static_cast<double>(next) + 0.5) / static_cast<double>(points)) continue;
    chosen.push_back(static_cast<int64_t>(i));
    while (next < points && sum >= total * (static_cast<double>(next) + 0.5) / static_cast<double>(points)) ++next;
  }
  return chosen;
}

// The ratio at a step: interpolated between the windows' middles, that of the nearest window outside them.
double RatioAt(const std::vector<double>& middles, const std::vector<double>& ratios, double step) {
  const size_t right = std::upper_bound(middles.begin(), middles.end(), step) - middles.begin();
  if (right == 0) return ratios.front();
  if (right == middles.size()) return ratios.back();
  const double share = (step - middles[right - 1]) / (middles[right] - middles[right - 1]);
  return ratios[right - 1] + share * (ratios[right] - ratios[right - 1]);
}

}  // namespace

int64_t SamplePlan::count() const {
  return std::count(chosen.begin(), chosen.end(), true);
}

absl::StatusOr<SamplePlan> PlanSamples(const std::vector<StepLoad>& steps, int64_t points, int64_t window) {
  SamplePlan plan;
  plan.chosen.resize(steps.size());
  const int64_t end = static_cast<int64_t>(steps.size());
  for (const int64_t middle : Spread(steps, points, [](const StepLoad& s) { return DecodeOnly(s) ? s.bytes : 0; })) {
    int64_t begin = std::clamp<int64_t>(middle - window / 2, 0, std::max<int64_t>(end - window, 0));
    if (!plan.windows.empty()) begin = std::max(begin, plan.windows.back().end);
    // One that the window before it has swallowed adds nothing.
    if (begin > middle) continue;
    plan.windows.push_back({begin, std::min(begin + window, end)});
  }
  if (plan.windows.empty()) {
    return absl::InvalidArgumentError(
        "--sample_steps: no step of this run has decode rows only, so there is none to measure the others by; "
        "leave the flag out to run every step");
  }
  plan.mixed = Spread(steps, points, [](const StepLoad& s) { return static_cast<double>(s.prefill_rows); });
  for (const StepWindow& w : plan.windows) std::fill(plan.chosen.begin() + w.begin, plan.chosen.begin() + w.end, true);
  for (const int64_t step : plan.mixed) plan.chosen[step] = true;
  return plan;
}

Integrated IntegrateSamples(const std::vector<StepLoad>& steps, const SamplePlan& plan,
                            const std::vector<double>& seconds, double bandwidth) {
  Integrated result;
  std::vector<double> middles;
  for (const StepWindow& w : plan.windows) {
    double measured = 0, floor = 0;
    for (int64_t i = w.begin; i < w.end; ++i) {
      if (!DecodeOnly(steps[i])) continue;
      measured += seconds[i];
      floor += steps[i].bytes / bandwidth;
    }
    middles.push_back(static_cast<double>(w.begin + w.end - 1) / 2);
    result.ratios.push_back(measured / floor);
  }
  const auto as_decode = [&](size_t i) {
    return steps[i].bytes / bandwidth * RatioAt(middles, result.ratios, static_cast<double>(i));
  };
  double excess = 0, rows = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (!plan.chosen[i] || DecodeOnly(steps[i])) continue;
    excess += seconds[i] - as_decode(i);
    rows += static_cast<double>(steps[i].prefill_rows);
  }
  if (rows > 0) result.prefill_row_seconds = std::max(excess / rows, 0.0);
  for (size_t i = 0; i < steps.size(); ++i) {
    result.seconds += as_decode(i) + static_cast<double>(steps[i].prefill_rows) * result.prefill_row_seconds;
  }
  return result;
}

}  // namespace lockstep

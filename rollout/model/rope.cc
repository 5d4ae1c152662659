#include "rollout/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

// theta^(2i / head_dim): base and exponent in fp32, the power correctly rounded (torch's is within 1 ulp of that).
std::vector<float> PositionFrequencies(double theta, int64_t head_dim) {
  const double base = static_cast<float>(theta);
  std::vector<float> powers(head_dim / 2);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    powers[i] = static_cast<float>(std::pow(base, static_cast<double>(exponent)));
  }
  return powers;
}

double YarnMscale(double scale, double mscale) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

double YarnAttentionFactor(const RopeParameters& p) {
  if (p.attention_factor.has_value()) return *p.attention_factor;
  const double mscale = p.mscale.value_or(0);
  const double all_dim = p.mscale_all_dim.value_or(0);
  if (mscale != 0 && all_dim != 0) return YarnMscale(p.factor, mscale) / YarnMscale(p.factor, all_dim);
  return YarnMscale(p.factor, 1);
}

// The dimension whose wave makes `rotations` turns over the original context.
double YarnCorrectionDim(const RopeParameters& p, double rotations, int64_t head_dim) {
  const double context = static_cast<double>(p.original_max_position);
  return static_cast<double>(head_dim) * std::log(context / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(p.theta));
}

std::vector<float> YarnFrequencies(const RopeParameters& p, int64_t head_dim) {
  double low = YarnCorrectionDim(p, p.beta_fast, head_dim);
  double high = YarnCorrectionDim(p, p.beta_slow, head_dim);
  if (p.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(head_dim - 1));
  if (low == high) high += 0.001;
  const auto ramp_begin = static_cast<float>(low);
  const auto ramp_width = static_cast<float>(high - low);

  const std::vector<float> powers = PositionFrequencies(p.theta, head_dim);
  std::vector<float> out(powers.size());
  for (size_t i = 0; i < powers.size(); ++i) {
    const float extrapolated = 1.0f / powers[i];
    const float interpolated = 1.0f / (static_cast<float>(p.factor) * powers[i]);
    const float ramp = std::clamp((static_cast<float>(i) - ramp_begin) / ramp_width, 0.0f, 1.0f);
    const float keep = 1.0f - ramp;
    out[i] = interpolated * (1.0f - keep) + extrapolated * keep;
  }
  return out;
}

}  // namespace

RopeSpec ComputeRope(const RopeParameters& parameters, int64_t head_dim) {
  LOCKSTEP_CHECK(head_dim > 0 && head_dim % 2 == 0, "RoPE rotates pairs: head_dim {} is odd", head_dim);
  RopeSpec rope;
  if (parameters.type == RopeType::kYarn) {
    rope.inv_freq = YarnFrequencies(parameters, head_dim);
    rope.attention_scaling = static_cast<float>(YarnAttentionFactor(parameters));
    return rope;
  }
  rope.inv_freq = PositionFrequencies(parameters.theta, head_dim);
  for (float& f : rope.inv_freq) {
    f = 1.0f / f;
    if (parameters.type == RopeType::kLinear) f /= static_cast<float>(parameters.factor);
  }
  return rope;
}

}  // namespace lockstep

// Rotary embedding frequencies, as transformers computes them (modeling_rope_utils.py): the same steps in the same
// precision.
#pragma once

#include <cstdint>
#include <optional>

#include "rollout/model/spec.h"

namespace lockstep {

enum class RopeType : uint8_t { kDefault, kLinear, kYarn };

struct RopeParameters {
  RopeType type = RopeType::kDefault;
  double theta = 10000;  // > 1
  double factor = 1;     // linear and yarn: how much longer the context is than the one trained on
  // YaRN (https://arxiv.org/abs/2309.00071).
  int64_t original_max_position = 0;
  double beta_fast = 32;  // rotations over the original context at and above which a frequency is left as it is
  double beta_slow = 1;   // ... at and below which it is divided by `factor`
  std::optional<double> attention_factor;
  std::optional<double> mscale;
  std::optional<double> mscale_all_dim;
  bool truncate = true;  // round the two bounds to whole dimensions
};

// head_dim must be even.
RopeSpec ComputeRope(const RopeParameters& parameters, int64_t head_dim);

}  // namespace lockstep

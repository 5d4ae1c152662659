// The RoPE fields of config.json, in today's form (rope_parameters) and the older one (rope_theta, rope_scaling), as
// transformers 5.17 reads them.
#pragma once

#include <optional>

#include "rollout/model/config_fields.h"
#include "rollout/model/rope.h"

namespace lockstep {

// olmo_hybrid: one set for all attention layers. nullopt: rope_theta is null, NoPE.
// With no rope_theta anywhere transformers takes 10000, not NoPE; so does this, with a warning in the log if there is
// an attention layer.
std::optional<RopeParameters> ParseOlmoHybridRope(ConfigFields& config, int64_t max_position, bool has_attention);

// olmo3: one set per layer type.
struct Olmo3Rope {
  RopeParameters sliding;
  RopeParameters full;
};
Olmo3Rope ParseOlmo3Rope(ConfigFields& config, int64_t max_position, bool has_sliding);

}  // namespace lockstep

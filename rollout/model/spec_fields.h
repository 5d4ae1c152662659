// Filling a ModelSpec from config.json: one function per model_type. They report through ConfigErrors and return what
// they could make of the rest.
#pragma once

#include <cstdint>

#include "rollout/model/config_fields.h"
#include "rollout/model/spec.h"

namespace lockstep {

// Limits that keep every product of sizes below 2^57; far above any model, so that what exceeds them is a mistake.
inline constexpr int64_t kMaxVocab = int64_t{1} << 24;
inline constexpr int64_t kMaxHidden = int64_t{1} << 17;
inline constexpr int64_t kMaxIntermediate = int64_t{1} << 20;
inline constexpr int64_t kMaxLayers = 4096;
inline constexpr int64_t kMaxHeads = 4096;
inline constexpr int64_t kMaxHeadDim = 4096;
inline constexpr int64_t kMaxPosition = int64_t{1} << 30;

// Fields that every model has: sizes, ties, the ones without effect and the ones with one allowed value. max_position's
// and norm_eps's defaults are the model's.
void ParseCommonFields(ConfigFields& config, int64_t default_max_position, double default_norm_eps, ModelSpec& spec);

// num_attention_heads, num_key_value_heads, head_dim.
AttentionShape ParseAttentionShape(ConfigFields& config, int64_t hidden_size);

// layer_types: `count` names. Absent: empty.
std::vector<std::string> ParseLayerTypes(ConfigFields& config, int64_t count);

void FillOlmoHybrid(ConfigFields& config, ModelSpec& spec);
void FillOlmo3(ConfigFields& config, ModelSpec& spec);

}  // namespace lockstep

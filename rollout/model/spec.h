// ModelSpec: what a checkpoint's config.json says, as data. A new model is a new way to fill it (and a name map), plus
// a mixer if its mathematics is new.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace lockstep {

enum class MixerKind : uint8_t { kFullAttention, kSlidingAttention, kGatedDeltaNet };
enum class NormPlacement : uint8_t {
  kPre,   // x + f(norm(x)): OLMo Hybrid's linear-attention layers
  kPost,  // x + norm(f(x)): OLMo's attention layers
};

// Rotary embedding, resolved to what a kernel needs. Formulas: transformers' modeling_rope_utils (default, linear,
// yarn).
struct RopeSpec {
  std::vector<float> inv_freq;  // [head_dim / 2]
  float attention_scaling = 1;
};

struct LayerSpec {
  MixerKind mixer = MixerKind::kFullAttention;
  NormPlacement norm = NormPlacement::kPost;
  AttentionShape attention;      // attention mixers
  std::optional<RopeSpec> rope;  // attention mixers; nullopt: NoPE
  GdnShape gdn;                  // GDN mixers
  bool gdn_neg_eigval = true;
  float gdn_norm_eps = 1e-5f;  // of the gated output norm
};

struct ModelSpec {
  std::string model_type;  // "olmo_hybrid", "olmo3"
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  float norm_eps = 1e-6f;
  bool tied_embeddings = false;
  int64_t max_position = 0;  // max_position_embeddings: the longest sequence (prompt and completion) the model takes
  std::vector<LayerSpec> layers;
  std::vector<int32_t> eos_token_ids;  // generation_config.json's, else config.json's; may be empty

  int64_t parameter_count() const;
};

// Parses config.json's text (and generation_config.json's, empty if there is none). A field that would change the
// output and is not understood, or a value out of range, is INVALID_ARGUMENT naming the field, the value and what would
// be right. See docs/models.md for the fields.
absl::StatusOr<ModelSpec> ParseModelSpec(std::string_view config_json, std::string_view generation_config_json);

// Reads DIR/config.json and DIR/generation_config.json.
absl::StatusOr<ModelSpec> LoadModelSpec(const std::filesystem::path& dir);

}  // namespace lockstep

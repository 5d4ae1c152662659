// A model's weights in the backend's layouts, loaded from a Hugging Face directory.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/model/spec.h"

namespace lockstep {

struct AttentionWeights {
  std::unique_ptr<LinearWeight> qkv;     // rows: q [heads * head_dim], k [kv_heads * head_dim], v [kv_heads * head_dim]
  std::unique_ptr<LinearWeight> o;       // [hidden, heads * head_dim]
  std::unique_ptr<VectorWeight> q_norm;  // [heads * head_dim]
  std::unique_ptr<VectorWeight> k_norm;  // [kv_heads * head_dim]
};

struct GdnWeights {
  // Rows: q [key_width], k [key_width], v [value_width], g (output gate) [value_width], a and b [value_heads] each. One
  // layer, since two of one row each would take as long as a whole one while few tokens are decoded.
  std::unique_ptr<LinearWeight> in;
  std::unique_ptr<LinearWeight> o;        // [hidden, value_width]
  std::unique_ptr<VectorWeight> conv;     // [conv_channels, conv_width], channels [q | k | v], oldest tap first
  std::unique_ptr<VectorWeight> a_log;    // [value_heads]
  std::unique_ptr<VectorWeight> dt_bias;  // [value_heads]
  std::unique_ptr<VectorWeight> o_norm;   // [value_dim]
};

struct LayerWeights {
  AttentionWeights attention;  // one of the two is filled, by the layer's mixer
  GdnWeights gdn;
  std::unique_ptr<VectorWeight> mixer_norm;  // kPre: input_layernorm; kPost: post_attention_layernorm
  std::unique_ptr<VectorWeight> mlp_norm;    // kPre: post_attention_layernorm; kPost: post_feedforward_layernorm
  std::unique_ptr<LinearWeight> gate_up;     // rows: gate [intermediate], up [intermediate]
  std::unique_ptr<LinearWeight> down;        // [hidden, intermediate]
};

struct ModelWeights {
  std::unique_ptr<EmbeddingTable> embedding;  // [vocab, hidden]; may be tied to the head
  std::vector<LayerWeights> layers;
  std::unique_ptr<VectorWeight> final_norm;  // [hidden]
  std::unique_ptr<LinearWeight> head;        // [vocab, hidden]; the embedding's too when tied

  int64_t bytes() const;  // as held by the backend
};

// Loads every tensor the spec names from DIR/model.safetensors or the shards of DIR/model.safetensors.index.json.
// Errors list missing, unexpected and misshapen tensors by name. Shows progress: a bar on a terminal, log lines
// elsewhere.
absl::StatusOr<ModelWeights> LoadModelWeights(const std::filesystem::path& dir, const ModelSpec& spec, Ops& ops);

}  // namespace lockstep

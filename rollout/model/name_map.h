// The tensors a spec needs, under the names a checkpoint may use for them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "rollout/model/spec.h"

namespace lockstep {

struct TensorSpec {
  std::string name;  // as transformers' state_dict has it
  std::vector<int64_t> shape;
  std::vector<std::string> aliases;  // other names of the same tensor
  // Names of tensors that, stacked along the first dimension, are this one; and the row counts they may have, one list
  // per accepted cut.
  std::vector<std::string> parts;
  std::vector<std::vector<int64_t>> part_rows;
  bool tied =
      false;  // the head of a model with tied embeddings: may be absent; if there, the same bytes as the embedding
};

inline constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
inline constexpr char kHeadName[] = "lm_head.weight";

// "model.layers.7."
std::string LayerPrefix(int64_t layer);

std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec);

// Tensors a checkpoint may hold that nobody reads: rotary buffers and multi-token-prediction layers, as transformers
// leaves them out.
bool IsIgnoredTensor(const ModelSpec& spec, std::string_view name);

}  // namespace lockstep

// The forward pass over one step's batch: a list of layers from the spec, each a mixer and an MLP around the residual
// stream, all through Ops.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/ops.h"
#include "rollout/model/spec.h"
#include "rollout/model/weights.h"

namespace lockstep {

// The rows of one sequence in a step: rows [row_begin, row_begin + row_count) of the batch are its positions [position,
// position + row_count).
struct SequencePiece {
  int64_t row_begin = 0;
  int64_t row_count = 0;
  int64_t position = 0;
  std::byte* state = nullptr;           // the sequence's slot: all GDN layers' states, StateLayout::offsets apart
  const int32_t* page_table = nullptr;  // [ceil((position + row_count) / page_size)]
};

struct ForwardBatch {
  std::span<const int32_t> tokens;     // [rows]
  std::span<const int64_t> positions;  // [rows]
  std::span<const SequencePiece> pieces;
};

// Where each GDN layer's state lies inside a sequence's slot.
struct StateLayout {
  std::vector<int64_t> offsets;  // by layer; -1: not a GDN layer
  int64_t bytes = 0;             // of a slot; 0: the model has no GDN layer
};
StateLayout MakeStateLayout(const ModelSpec& spec, const Ops& ops);

// Bytes of KV that one page takes over all attention layers.
int64_t KvBytesPerPage(const ModelSpec& spec, const Ops& ops, int64_t page_size);

class ForwardPass {
 public:
  // All must outlive it. `max_rows`: the most rows of one step; buffers for them are allocated here.
  ForwardPass(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, const StateLayout& layout,
              int64_t max_rows);

  // kv: by layer; entries of GDN layers are not read. Afterwards hidden() holds the rows' residual stream.
  void Run(const ForwardBatch& batch, std::span<const KvLayer> kv);

  // logits [rows.size(), vocab] of the given rows of the last Run: final norm and head. At most kLogitRows rows.
  static constexpr int64_t kLogitRows = 64;
  Rows Logits(std::span<const int64_t> rows);

  int64_t max_rows() const { return max_rows_; }
  // Of the activations.
  int64_t buffer_bytes() const;

 private:
  Rows Take(std::vector<float>& buffer, int64_t rows, int64_t width) const;
  void Mixer(const LayerSpec& layer, const LayerWeights& weights, Rows in, const ForwardBatch& batch,
             std::span<const Piece> pieces, const KvLayer& kv, Rows out);
  void AttentionMixer(const LayerSpec& layer, const AttentionWeights& weights, Rows in, const ForwardBatch& batch,
                      std::span<const Piece> pieces, const KvLayer& kv, Rows out);
  void GdnMixer(const LayerSpec& layer, const GdnWeights& weights, Rows in, std::span<const Piece> pieces, Rows out);
  void Mlp(const LayerWeights& weights, Rows in, Rows out);

  const ModelSpec& spec_;
  const ModelWeights& weights_;
  Ops& ops_;
  const StateLayout& layout_;
  int64_t max_rows_;
  std::vector<Piece> pieces_;
  // Activations, [max_rows, width] each. wide_: a fused projection or gate_up; mixed_: what a mixer makes of it.
  std::vector<float> residual_, normed_, branch_, wide_, mixed_, conv_, gates_, logits_;
};

}  // namespace lockstep

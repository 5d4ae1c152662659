#include "rollout/model/forward.h"

#include <algorithm>
#include <cstring>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

bool IsGdn(const LayerSpec& layer) {
  return layer.mixer == MixerKind::kGatedDeltaNet;
}

int64_t AttentionWidth(const LayerSpec& layer) {
  return layer.attention.heads * layer.attention.head_dim;
}
int64_t KvWidth(const LayerSpec& layer) {
  return layer.attention.kv_heads * layer.attention.head_dim;
}

// The widest buffers any layer needs.
struct Widths {
  int64_t wide = 0, mixed = 0, conv = 0, gates = 0;
};
Widths WidthsOf(const ModelSpec& spec) {
  Widths w;
  w.wide = 2 * spec.intermediate_size;
  w.mixed = spec.intermediate_size;
  for (const LayerSpec& layer : spec.layers) {
    if (IsGdn(layer)) {
      w.wide = std::max(w.wide, layer.gdn.conv_channels() + layer.gdn.value_width());
      w.mixed = std::max(w.mixed, layer.gdn.value_width());
      w.conv = std::max(w.conv, layer.gdn.conv_channels());
      w.gates = std::max(w.gates, 4 * layer.gdn.value_heads);
    } else {
      w.wide = std::max(w.wide, AttentionWidth(layer) + 2 * KvWidth(layer));
      w.mixed = std::max(w.mixed, AttentionWidth(layer));
    }
  }
  return w;
}

}  // namespace

StateLayout MakeStateLayout(const ModelSpec& spec, const Ops& ops) {
  StateLayout layout;
  for (const LayerSpec& layer : spec.layers) {
    layout.offsets.push_back(IsGdn(layer) ? layout.bytes : -1);
    if (IsGdn(layer)) layout.bytes += ops.GdnStateBytes(layer.gdn);
  }
  return layout;
}

int64_t KvBytesPerPage(const ModelSpec& spec, const Ops& ops, int64_t page_size) {
  int64_t bytes = 0;
  for (const LayerSpec& layer : spec.layers) {
    if (!IsGdn(layer)) bytes += ops.KvPageBytes(layer.attention, page_size);
  }
  return bytes;
}

ForwardPass::ForwardPass(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, const StateLayout& layout,
                         int64_t max_rows)
    : spec_(spec), weights_(weights), ops_(ops), layout_(layout), max_rows_(max_rows) {
  const Widths w = WidthsOf(spec);
  residual_.resize(max_rows * spec.hidden_size);
  normed_.resize(max_rows * spec.hidden_size);
  branch_.resize(max_rows * spec.hidden_size);
  wide_.resize(max_rows * w.wide);
  mixed_.resize(max_rows * w.mixed);
  conv_.resize(max_rows * w.conv);
  gates_.resize(max_rows * w.gates);
  logits_.resize(kLogitRows * spec.vocab_size);
}

int64_t ForwardPass::buffer_bytes() const {
  return static_cast<int64_t>(sizeof(float) * (residual_.size() + normed_.size() + branch_.size() + wide_.size() +
                                               mixed_.size() + conv_.size() + gates_.size() + logits_.size()));
}

Rows ForwardPass::Take(std::vector<float>& buffer, int64_t rows, int64_t width) const {
  LOCKSTEP_CHECK(rows * width <= static_cast<int64_t>(buffer.size()), "[{}, {}] does not fit a buffer of {}", rows,
                 width, buffer.size());
  return {buffer.data(), rows, width, width};
}

void ForwardPass::Run(const ForwardBatch& batch, std::span<const KvLayer> kv) {
  const int64_t rows = static_cast<int64_t>(batch.tokens.size());
  LOCKSTEP_CHECK(rows >= 1 && rows <= max_rows_ && batch.positions.size() == batch.tokens.size(),
                 "{} rows of {}, {} positions", rows, max_rows_, batch.positions.size());
  const Rows residual = Take(residual_, rows, spec_.hidden_size);
  const Rows normed = Take(normed_, rows, spec_.hidden_size);
  const Rows branch = Take(branch_, rows, spec_.hidden_size);
  ops_.Embed(batch.tokens, *weights_.embedding, residual);

  pieces_.resize(batch.pieces.size());
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    const LayerSpec& layer = spec_.layers[i];
    const LayerWeights& w = weights_.layers[i];
    for (size_t p = 0; p < pieces_.size(); ++p) {
      const SequencePiece& piece = batch.pieces[p];
      pieces_[p] = {piece.row_begin, piece.row_count, piece.position,
                    IsGdn(layer) ? piece.state + layout_.offsets[i] : nullptr, piece.page_table};
    }
    if (layer.norm == NormPlacement::kPre) {
      ops_.RmsNorm(residual, w.mixer_norm.data(), spec_.norm_eps, normed);
      Mixer(layer, w, normed, batch, pieces_, kv[i], branch);
      ops_.AddRmsNorm(branch, residual, w.mlp_norm.data(), spec_.norm_eps, normed);
      Mlp(w, normed, branch);
      ops_.Add(branch, residual);
    } else {
      Mixer(layer, w, residual, batch, pieces_, kv[i], branch);
      ops_.RmsNormAdd(branch, w.mixer_norm.data(), spec_.norm_eps, residual);
      Mlp(w, residual, branch);
      ops_.RmsNormAdd(branch, w.mlp_norm.data(), spec_.norm_eps, residual);
    }
  }
}

Rows ForwardPass::Logits(std::span<const int64_t> rows) {
  const int64_t count = static_cast<int64_t>(rows.size());
  LOCKSTEP_CHECK(count >= 1 && count <= kLogitRows, "{} logit rows, want 1 to {}", count, kLogitRows);
  // branch_ may be smaller than kLogitRows rows, but a row is asked for at most once, so there are never more than the
  // step had.
  const Rows gathered = Take(branch_, count, spec_.hidden_size);
  const int64_t hidden = spec_.hidden_size;
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(gathered.row(i), residual_.data() + rows[i] * hidden, hidden * sizeof(float));
  ops_.RmsNorm(gathered, weights_.final_norm.data(), spec_.norm_eps, gathered);
  const Rows logits = Take(logits_, count, spec_.vocab_size);
  ops_.Logits(gathered, *weights_.head, logits);
  return logits;
}

void ForwardPass::Mixer(const LayerSpec& layer, const LayerWeights& weights, Rows in, const ForwardBatch& batch,
                        std::span<const Piece> pieces, const KvLayer& kv, Rows out) {
  if (IsGdn(layer)) {
    GdnMixer(layer, weights.gdn, in, pieces, out);
  } else {
    AttentionMixer(layer, weights.attention, in, batch, pieces, kv, out);
  }
}

void ForwardPass::AttentionMixer(const LayerSpec& layer, const AttentionWeights& weights, Rows in,
                                 const ForwardBatch& batch, std::span<const Piece> pieces, const KvLayer& kv,
                                 Rows out) {
  const AttentionShape& shape = layer.attention;
  const int64_t q_width = AttentionWidth(layer), kv_width = KvWidth(layer);
  const Rows qkv = Take(wide_, in.rows, q_width + 2 * kv_width);
  ops_.Linear(in, *weights.qkv, qkv);
  const Rows q = qkv.columns(0, q_width), k = qkv.columns(q_width, kv_width),
             v = qkv.columns(q_width + kv_width, kv_width);
  ops_.RmsNorm(q, weights.q_norm.data(), spec_.norm_eps, q);
  ops_.RmsNorm(k, weights.k_norm.data(), spec_.norm_eps, k);
  if (layer.rope) {
    ops_.Rope(q, batch.positions, layer.rope->inv_freq, layer.rope->attention_scaling, shape.head_dim);
    ops_.Rope(k, batch.positions, layer.rope->inv_freq, layer.rope->attention_scaling, shape.head_dim);
  }
  ops_.WriteKv(k, v, shape, pieces, kv);
  const Rows mixed = Take(mixed_, in.rows, q_width);
  ops_.Attention(q, shape, pieces, kv, mixed);
  ops_.Linear(mixed, *weights.o, out);
}

void ForwardPass::GdnMixer(const LayerSpec& layer, const GdnWeights& weights, Rows in, std::span<const Piece> pieces,
                           Rows out) {
  const GdnShape& shape = layer.gdn;
  const Rows projected = Take(wide_, in.rows, shape.conv_channels() + shape.value_width());
  ops_.Linear(in, *weights.qkv_g, projected);
  const Rows gates = Take(gates_, in.rows, 4 * shape.value_heads);
  const Rows a = gates.columns(0, shape.value_heads), b = gates.columns(shape.value_heads, shape.value_heads);
  const Rows beta = gates.columns(2 * shape.value_heads, shape.value_heads),
             g = gates.columns(3 * shape.value_heads, shape.value_heads);
  ops_.Linear(in, *weights.ab, gates.columns(0, 2 * shape.value_heads));
  ops_.GdnGates(a, b, weights.a_log.data(), weights.dt_bias.data(), layer.gdn_neg_eigval, beta, g);
  const Rows conv = Take(conv_, in.rows, shape.conv_channels());
  ops_.GdnConv(projected.columns(0, shape.conv_channels()), weights.conv.data(), shape, pieces, conv);
  const Rows mixed = Take(mixed_, in.rows, shape.value_width());
  ops_.GdnChunk(conv, beta, g, shape, pieces, mixed);
  ops_.GatedRmsNorm(mixed, projected.columns(shape.conv_channels(), shape.value_width()), weights.o_norm.data(),
                    layer.gdn_norm_eps, shape.value_dim, mixed);
  ops_.Linear(mixed, *weights.o, out);
}

void ForwardPass::Mlp(const LayerWeights& weights, Rows in, Rows out) {
  const Rows gate_up = Take(wide_, in.rows, 2 * spec_.intermediate_size);
  const Rows mixed = Take(mixed_, in.rows, spec_.intermediate_size);
  ops_.Linear(in, *weights.gate_up, gate_up);
  ops_.SwiGlu(gate_up, mixed);
  ops_.Linear(mixed, *weights.down, out);
}

}  // namespace lockstep

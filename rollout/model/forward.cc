#include "rollout/model/forward.h"

#include <algorithm>

#include "rollout/base/check.h"
#include "rollout/base/status.h"

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

// Widths are in elements; a row begins at a multiple of this many, so that a device may load 16 bytes at a time.
constexpr int64_t kRowAlign = 64;
int64_t Aligned(int64_t width) {
  return (width + kRowAlign - 1) / kRowAlign * kRowAlign;
}

// q | k | v | g | a | b of a GDN layer.
int64_t GdnInWidth(const GdnShape& shape) {
  return shape.conv_channels() + shape.value_width() + 2 * shape.value_heads;
}

// The widest buffers any layer needs.
struct Widths {
  int64_t wide = 0, mixed = 0, conv = 0, heads = 0;
};
Widths WidthsOf(const ModelSpec& spec) {
  Widths w;
  w.wide = 2 * spec.intermediate_size;
  w.mixed = spec.intermediate_size;
  for (const LayerSpec& layer : spec.layers) {
    if (IsGdn(layer)) {
      w.wide = std::max(w.wide, GdnInWidth(layer.gdn));
      w.mixed = std::max(w.mixed, layer.gdn.value_width());
      w.conv = std::max(w.conv, layer.gdn.conv_channels());
      w.heads = std::max(w.heads, layer.gdn.value_heads);
    } else {
      w.wide = std::max(w.wide, AttentionWidth(layer) + 2 * KvWidth(layer));
      w.mixed = std::max(w.mixed, AttentionWidth(layer));
    }
  }
  return w;
}

// Buffers one after the other in one piece of memory; with no base it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  Rows Take(int64_t rows, int64_t width, DType dtype) {
    const int64_t stride = Aligned(width);
    const Rows buffer{base_ == nullptr ? nullptr : base_ + bytes_, rows, width, stride, dtype};
    bytes_ += rows * stride * DTypeBytes(dtype);
    return buffer;
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  int64_t bytes_ = 0;
};

}  // namespace

struct ForwardPass::Buffers {
  Buffers(const ModelSpec& spec, const Ops& ops, int64_t max_rows, std::byte* base) : carver(base) {
    const Widths w = WidthsOf(spec);
    const DType type = ops.activation_dtype();
    residual = carver.Take(max_rows, spec.hidden_size, ops.residual_dtype());
    normed = carver.Take(max_rows, spec.hidden_size, type);
    branch = carver.Take(max_rows, spec.hidden_size, type);
    wide = carver.Take(max_rows, w.wide, type);
    mixed = carver.Take(max_rows, w.mixed, type);
    conv = carver.Take(max_rows, w.conv, type);
    beta = carver.Take(max_rows, w.heads, type);
    g = carver.Take(max_rows, w.heads, DType::kF32);
    gathered = carver.Take(ops.max_logit_rows(), spec.hidden_size, ops.residual_dtype());
    head_in = carver.Take(ops.max_logit_rows(), spec.hidden_size, type);
    logits = carver.Take(ops.max_logit_rows(), spec.vocab_size, ops.logit_dtype());
  }
  Carver carver;
  // wide: a fused projection or gate_up; mixed: what a mixer makes of it.
  Rows residual, normed, branch, wide, mixed, conv, beta, g, gathered, head_in, logits;
};

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

int64_t ForwardPass::BufferBytes(const ModelSpec& spec, const Ops& ops, int64_t max_rows) {
  return Buffers(spec, ops, max_rows, nullptr).carver.bytes();
}

absl::StatusOr<std::unique_ptr<ForwardPass>> ForwardPass::Create(const ModelSpec& spec, const ModelWeights& weights,
                                                                 Ops& ops, int64_t max_rows) {
  std::unique_ptr<ForwardPass> pass(new ForwardPass(spec, weights, ops, max_rows));
  LOCKSTEP_ASSIGN_OR_RETURN(pass->memory_, ops.Allocate(BufferBytes(spec, ops, max_rows)));
  pass->buffers_ = std::make_unique<Buffers>(spec, ops, max_rows, pass->memory_->data());
  for (const LayerSpec& layer : spec.layers) {
    pass->inv_freq_.emplace_back();
    if (!layer.rope) continue;
    LOCKSTEP_ASSIGN_OR_RETURN(pass->inv_freq_.back(), ops.PackVector(layer.rope->inv_freq, /*exact=*/true));
  }
  return pass;
}

ForwardPass::ForwardPass(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, int64_t max_rows)
    : spec_(spec), weights_(weights), ops_(ops), max_rows_(max_rows) {}

ForwardPass::~ForwardPass() = default;

Rows ForwardPass::Take(const Rows& buffer, int64_t rows, int64_t width) {
  LOCKSTEP_CHECK(rows <= buffer.rows && width <= buffer.width, "[{}, {}] does not fit a buffer of [{}, {}]", rows,
                 width, buffer.rows, buffer.width);
  // As dense as the width allows, whatever the buffer was sized for.
  return {buffer.data, rows, width, Aligned(width), buffer.dtype};
}

void ForwardPass::Record(int64_t layer, const char* name, Rows rows, const Trace::Parts& parts) {
  if (trace_ != nullptr) trace_->Record(ops_, layer, name, rows, ops_.profile().activations, parts);
}

void ForwardPass::RecordResidual(int64_t layer, const char* name, Rows residual) {
  if (trace_ != nullptr) trace_->Record(ops_, layer, name, residual, ops_.profile().residual);
}

Rows ForwardPass::LinearInput(Rows residual, Rows room) {
  if (ops_.profile().residual == ops_.profile().activations) return residual;
  ops_.RoundResidual(residual, room);
  return room;
}

void ForwardPass::Run(int64_t rows, std::span<const KvLayer> kv, std::span<const GdnLayer> states) {
  LOCKSTEP_CHECK(rows >= 1 && rows <= max_rows_, "{} rows of {}", rows, max_rows_);
  const Rows residual = Take(buffers_->residual, rows, spec_.hidden_size);
  const Rows normed = Take(buffers_->normed, rows, spec_.hidden_size);
  const Rows branch = Take(buffers_->branch, rows, spec_.hidden_size);
  ops_.Embed(*weights_.embedding, residual);
  RecordResidual(-1, "embed", residual);
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    const LayerSpec& layer = spec_.layers[i];
    const LayerWeights& w = weights_.layers[i];
    const auto mixer = [&](Rows in) {
      if (IsGdn(layer)) {
        GdnMixer(i, w.gdn, in, states[i], branch);
      } else {
        AttentionMixer(i, w.attention, in, kv[i], branch);
      }
    };
    if (layer.norm == NormPlacement::kPre) {
      ops_.RmsNorm(residual, *w.mixer_norm, spec_.norm_eps, normed);
      Record(i, "input_norm", normed);
      mixer(normed);
      ops_.AddRmsNorm(branch, residual, *w.mlp_norm, spec_.norm_eps, normed);
      RecordResidual(i, "residual_mid", residual);
      Record(i, "mlp_norm", normed);
      Mlp(i, w, normed, branch);
      ops_.Add(branch, residual);
    } else {
      mixer(LinearInput(residual, normed));
      ops_.RmsNormAdd(branch, *w.mixer_norm, spec_.norm_eps, residual);
      RecordResidual(i, "residual_mid", residual);
      Mlp(i, w, LinearInput(residual, normed), branch);
      ops_.RmsNormAdd(branch, *w.mlp_norm, spec_.norm_eps, residual);
    }
    RecordResidual(i, "residual", residual);
  }
}

Rows ForwardPass::Logits(int64_t begin, int64_t count) {
  const Rows gathered = Take(buffers_->gathered, count, spec_.hidden_size);
  const Rows normed = Take(buffers_->head_in, count, spec_.hidden_size);
  ops_.GatherLogitRows(Take(buffers_->residual, max_rows_, spec_.hidden_size), begin, gathered);
  ops_.RmsNorm(gathered, *weights_.final_norm, spec_.norm_eps, normed);
  ops_.Logits(normed, *weights_.head, logits(count));
  if (trace_ != nullptr) {
    trace_->RecordLogitRows(ops_, "final_norm", normed, ops_.profile().activations, begin);
    trace_->RecordLogitRows(ops_, "logits", logits(count), ops_.profile().logits, begin);
  }
  return logits(count);
}

Rows ForwardPass::logits(int64_t count) const {
  return Take(buffers_->logits, count, spec_.vocab_size);
}

void ForwardPass::AttentionMixer(size_t index, const AttentionWeights& weights, Rows in, const KvLayer& kv, Rows out) {
  const LayerSpec& layer = spec_.layers[index];
  const AttentionShape& shape = layer.attention;
  const int64_t q_width = AttentionWidth(layer), kv_width = KvWidth(layer);
  const Rows qkv = Take(buffers_->wide, in.rows, q_width + 2 * kv_width);
  ops_.Linear(in, *weights.qkv, qkv);
  Record(index, "qkv", qkv, {{"q", q_width}, {"k", kv_width}, {"v", kv_width}});
  const Rows q = qkv.columns(0, q_width), k = qkv.columns(q_width, kv_width),
             v = qkv.columns(q_width + kv_width, kv_width);
  ops_.RmsNorm(q, *weights.q_norm, spec_.norm_eps, q);
  ops_.RmsNorm(k, *weights.k_norm, spec_.norm_eps, k);
  Record(index, "q_norm", q);
  Record(index, "k_norm", k);
  if (layer.rope) {
    ops_.Rope(q, k, *inv_freq_[index], layer.rope->attention_scaling, shape.head_dim);
    Record(index, "rope_q", q);
    Record(index, "rope_k", k);
  }
  ops_.WriteKv(k, v, shape, kv);
  const Rows mixed = Take(buffers_->mixed, in.rows, q_width);
  ops_.Attention(q, shape, kv, mixed);
  Record(index, "attn_out", mixed);
  ops_.Linear(mixed, *weights.o, out);
  Record(index, "mixer_out", out);
}

void ForwardPass::GdnMixer(size_t index, const GdnWeights& weights, Rows in, const GdnLayer& state, Rows out) {
  const LayerSpec& layer = spec_.layers[index];
  const GdnShape& shape = layer.gdn;
  const int64_t keys = shape.key_width(), values = shape.value_width(), heads = shape.value_heads;
  const Rows projected = Take(buffers_->wide, in.rows, GdnInWidth(shape));
  ops_.Linear(in, *weights.in, projected);
  const int64_t before_ab = shape.conv_channels() + values;
  Record(index, "qkv_g", projected.columns(0, before_ab), {{"q", keys}, {"k", keys}, {"v", values}, {"g", values}});
  const Rows ab = projected.columns(before_ab, 2 * heads);
  Record(index, "ab", ab, {{"a", heads}, {"b", heads}});
  const Rows beta = Take(buffers_->beta, in.rows, heads);
  const Rows g = Take(buffers_->g, in.rows, heads);
  const Rows conv = Take(buffers_->conv, in.rows, shape.conv_channels());
  ops_.GdnConvAndGates(projected.columns(0, shape.conv_channels()), *weights.conv, shape, state, conv,
                       {.a = ab.columns(0, heads),
                        .b = ab.columns(heads, heads),
                        .a_log = *weights.a_log,
                        .dt_bias = *weights.dt_bias,
                        .neg_eigval = layer.gdn_neg_eigval,
                        .beta = beta,
                        .g = g});
  if (ops_.normalises_in_conv()) {
    Record(index, "qk_l2", conv.columns(0, 2 * keys), {{"q", keys}, {"k", keys}});
    Record(index, "conv_v", conv.columns(2 * keys, values));
  } else {
    Record(index, "conv", conv, {{"q", keys}, {"k", keys}, {"v", values}});
  }
  Record(index, "beta", beta);
  if (trace_ != nullptr) trace_->Record(ops_, static_cast<int64_t>(index), "g", g, DType::kF32);
  const Rows mixed = Take(buffers_->mixed, in.rows, values);
  const Rows gate = projected.columns(shape.conv_channels(), values);
  if (trace_ == nullptr) {
    ops_.GdnChunkNorm(conv, beta, g, shape, state, gate, *weights.o_norm, layer.gdn_norm_eps, mixed);
  } else {
    ops_.GdnChunk(conv, beta, g, shape, state, mixed);
    Record(index, "gdn_out", mixed);
    ops_.GatedRmsNorm(mixed, gate, *weights.o_norm, layer.gdn_norm_eps, shape.value_dim, mixed);
    Record(index, "gated_norm", mixed);
  }
  ops_.Linear(mixed, *weights.o, out);
  Record(index, "mixer_out", out);
}

void ForwardPass::Mlp(size_t index, const LayerWeights& weights, Rows in, Rows out) {
  const Rows gate_up = Take(buffers_->wide, in.rows, 2 * spec_.intermediate_size);
  const Rows mixed = Take(buffers_->mixed, in.rows, spec_.intermediate_size);
  if (trace_ == nullptr) {
    ops_.LinearSwiGlu(in, *weights.gate_up, gate_up, mixed);
  } else {  // a backend may never have gate_up in memory
    ops_.Linear(in, *weights.gate_up, gate_up);
    Record(index, "gate_up", gate_up, {{"gate", spec_.intermediate_size}, {"up", spec_.intermediate_size}});
    ops_.SwiGlu(gate_up, mixed);
  }
  Record(index, "swiglu", mixed);
  ops_.Linear(mixed, *weights.down, out);
  Record(index, "mlp_out", out);
}

}  // namespace lockstep

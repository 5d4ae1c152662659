#include "tests/testing/random_model.h"

#include <cmath>
#include <random>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

class RandomWeights {
 public:
  RandomWeights(uint64_t seed, Ops& ops) : rng_(seed), ops_(ops) {}

  std::unique_ptr<VectorWeight> Vector(int64_t n, float mean, float std, bool exact = false) {
    return *ops_.PackVector(Values(n, mean, std), exact);
  }

  std::unique_ptr<VectorWeight> Norm(int64_t n) {
    return Vector(n, 1, 0.1f, ops_.profile().norm_weights == DType::kF32);
  }

  std::unique_ptr<LinearWeight> Linear(int64_t out, int64_t in) {
    const std::vector<float> v = Values(out * in, 0, 1.2f / std::sqrt(static_cast<float>(in)));
    const HostMatrix part{v.data(), out, in, DType::kF32};
    return *ops_.PackLinear({&part, 1});
  }

  std::unique_ptr<EmbeddingTable> Embedding(int64_t vocab, int64_t hidden) {
    const std::vector<float> v = Values(vocab * hidden, 0, 1);
    return *ops_.PackEmbedding({v.data(), vocab, hidden, DType::kF32});
  }

 private:
  std::vector<float> Values(int64_t n, float mean, float std) {
    std::normal_distribution<float> normal(mean, std);
    std::vector<float> v(n);
    for (float& x : v) x = normal(rng_);
    return v;
  }

  std::mt19937_64 rng_;
  Ops& ops_;
};

LayerSpec MakeGdnLayer(int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, bool neg_eigval) {
  LayerSpec layer;
  layer.mixer = MixerKind::kGatedDeltaNet;
  layer.norm = NormPlacement::kPre;
  layer.gdn = {key_heads, value_heads, key_dim, value_dim, 4};
  layer.gdn_neg_eigval = neg_eigval;
  return layer;
}

LayerSpec MakeAttentionLayer(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, bool rope) {
  LayerSpec layer;
  layer.mixer = window > 0 ? MixerKind::kSlidingAttention : MixerKind::kFullAttention;
  layer.norm = NormPlacement::kPost;
  layer.attention = {heads, kv_heads, head_dim, window, 1.0f / std::sqrt(static_cast<float>(head_dim))};
  if (rope) {
    RopeSpec r;
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      r.inv_freq.push_back(1.0f / std::pow(10000.0f, 2.0f * static_cast<float>(i) / static_cast<float>(head_dim)));
    }
    r.attention_scaling = 1.1f;
    layer.rope = r;
  }
  return layer;
}

}  // namespace

std::vector<ModelKind> AllModelKinds() {
  return {ModelKind::kHybrid, ModelKind::kHybridGroupedRope, ModelKind::kDenseSliding, ModelKind::kAllGdn};
}

std::string ModelKindName(ModelKind kind) {
  switch (kind) {
    case ModelKind::kHybrid:
      return "hybrid";
    case ModelKind::kHybridGroupedRope:
      return "hybrid, grouped heads and RoPE";
    case ModelKind::kDenseSliding:
      return "dense, sliding and full attention";
    case ModelKind::kAllGdn:
      return "all GDN";
  }
  LOCKSTEP_CHECK(false, "unknown model kind");
  return "";
}

ModelSpec RandomSpec(ModelKind kind) {
  ModelSpec spec;
  spec.model_type = kind == ModelKind::kDenseSliding ? "olmo3" : "olmo_hybrid";
  spec.vocab_size = 211;
  spec.hidden_size = 48;
  spec.intermediate_size = 80;
  spec.max_position = 4096;
  switch (kind) {
    case ModelKind::kHybrid:
      spec.layers = {MakeGdnLayer(2, 2, 24, 40, true), MakeAttentionLayer(3, 3, 16, 0, false)};
      break;
    case ModelKind::kHybridGroupedRope:
      spec.layers = {MakeGdnLayer(1, 3, 16, 32, false), MakeAttentionLayer(4, 2, 12, 0, true)};
      break;
    case ModelKind::kDenseSliding:
      spec.layers = {MakeAttentionLayer(3, 3, 16, 37, true), MakeAttentionLayer(3, 3, 16, 0, true)};
      break;
    case ModelKind::kAllGdn:
      spec.layers = {MakeGdnLayer(2, 2, 16, 24, true), MakeGdnLayer(2, 4, 16, 24, false)};
      break;
  }
  return spec;
}

ModelSpec RandomCudaSpec(ModelKind kind) {
  ModelSpec spec = RandomSpec(kind);
  spec.hidden_size = 128;
  spec.intermediate_size = 208;
  switch (kind) {
    case ModelKind::kHybrid:
      // So many heads that decode of three sequences is not spread over the card, as a 7B's is not.
      spec.layers = {MakeGdnLayer(2, 2, 96, 192, true), MakeAttentionLayer(24, 24, 128, 0, false)};
      break;
    case ModelKind::kHybridGroupedRope:
      spec.layers = {MakeGdnLayer(1, 3, 96, 192, false), MakeAttentionLayer(4, 2, 128, 0, true)};
      break;
    case ModelKind::kDenseSliding:
      spec.layers = {MakeAttentionLayer(3, 3, 128, 37, true), MakeAttentionLayer(3, 3, 128, 0, true)};
      break;
    case ModelKind::kAllGdn:
      spec.layers = {MakeGdnLayer(2, 2, 96, 192, true), MakeGdnLayer(2, 4, 96, 192, false)};
      break;
  }
  return spec;
}

std::unique_ptr<LocalModel> MakeRandomModel(ModelKind kind, const std::string& numerics, uint64_t seed, int threads,
                                            const BackendOptions& backend) {
  auto model = std::make_unique<LocalModel>();
  model->spec = backend.name == "cuda" ? RandomCudaSpec(kind) : RandomSpec(kind);
  const ModelSpec& spec = model->spec;
  model->threads = std::make_unique<ThreadPool>(threads);
  const absl::StatusOr<NumericsProfile> profile = FindNumericsProfile(numerics);
  LOCKSTEP_CHECK(profile.ok(), "{}", std::string(profile.status().message()));
  absl::StatusOr<std::unique_ptr<Backend>> made = MakeBackend(backend, *profile, model->threads.get());
  LOCKSTEP_CHECK(made.ok(), "{}", std::string(made.status().message()));
  model->backend = *std::move(made);
  RandomWeights random(seed, model->ops());
  ModelWeights& w = model->weights;
  w.embedding = random.Embedding(spec.vocab_size, spec.hidden_size);
  for (const LayerSpec& layer : spec.layers) {
    LayerWeights lw;
    lw.mixer_norm = random.Norm(spec.hidden_size);
    lw.mlp_norm = random.Norm(spec.hidden_size);
    lw.gate_up = random.Linear(2 * spec.intermediate_size, spec.hidden_size);
    lw.down = random.Linear(spec.hidden_size, spec.intermediate_size);
    if (layer.mixer == MixerKind::kGatedDeltaNet) {
      const GdnShape& g = layer.gdn;
      lw.gdn.in = random.Linear(g.conv_channels() + g.value_width() + 2 * g.value_heads, spec.hidden_size);
      lw.gdn.o = random.Linear(spec.hidden_size, g.value_width());
      lw.gdn.conv = random.Vector(g.conv_channels() * g.conv_width, 0, 0.5f);
      lw.gdn.a_log = random.Vector(g.value_heads, 0, 1, /*exact=*/true);
      lw.gdn.dt_bias = random.Vector(g.value_heads, -4, 1, /*exact=*/true);
      lw.gdn.o_norm = random.Norm(g.value_dim);
    } else {
      const AttentionShape& a = layer.attention;
      lw.attention.qkv = random.Linear((a.heads + 2 * a.kv_heads) * a.head_dim, spec.hidden_size);
      lw.attention.o = random.Linear(spec.hidden_size, a.heads * a.head_dim);
      lw.attention.q_norm = random.Norm(a.heads * a.head_dim);
      lw.attention.k_norm = random.Norm(a.kv_heads * a.head_dim);
    }
    w.layers.push_back(std::move(lw));
  }
  w.final_norm = random.Norm(spec.hidden_size);
  w.head = random.Linear(spec.vocab_size, spec.hidden_size);
  return model;
}

}  // namespace lockstep

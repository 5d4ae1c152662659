#include "rollout/model/weights.h"

#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/float_bits.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"
#include "rollout/base/tensor_shape.h"
#include "rollout/model/checkpoint.h"
#include "rollout/model/load_progress.h"
#include "rollout/model/name_map.h"
#include "rollout/model/tensor_resolver.h"
#include "rollout/model/tensor_values.h"

namespace lockstep {
namespace {

// The values of a mapped tensor, aligned to their type. A file aligns its data section as its header's length falls;
// most end on a multiple of 8, and the others are copied.
class AlignedTensor {
 public:
  explicit AlignedTensor(const CheckpointTensor& tensor) {
    values_ = {.data = tensor.data(), .count = tensor.entry->elements, .dtype = *tensor.entry->dtype};
    if (reinterpret_cast<uintptr_t>(values_.data) % DTypeBytes(values_.dtype) == 0 || values_.count == 0) return;
    copy_.resize(tensor.entry->bytes());
    std::memcpy(copy_.data(), tensor.data(), copy_.size());
    values_.data = copy_.data();
  }
  AlignedTensor(AlignedTensor&&) = default;  // a moved vector keeps its buffer
  AlignedTensor(const AlignedTensor&) = delete;

  const TensorValues& values() const { return values_; }

 private:
  TensorValues values_;
  std::vector<std::byte> copy_;
};

std::string PlaceText(const std::vector<int64_t>& shape, int64_t index) {
  std::vector<int64_t> place(shape.size());
  for (size_t i = shape.size(); i-- > 0; index /= shape[i]) place[i] = index % shape[i];
  return ShapeText(place);
}

// Reads resolved tensors into the backend's layouts, one after the other; the first error is kept and everything after
// it is skipped.
class Loader {
 public:
  Loader(const ResolvedTensors& tensors, Ops& ops, LoadProgress& progress)
      : tensors_(tensors), ops_(ops), progress_(progress) {}

  const absl::Status& status() const { return status_; }

  // The named matrices, stacked.
  std::unique_ptr<LinearWeight> Linear(const std::vector<std::string>& names) {
    std::vector<AlignedTensor> parts;
    std::vector<HostMatrix> matrices;
    for (const std::string& name : names) {
      const CheckpointTensor& tensor = Only(name);
      parts.emplace_back(tensor);
      matrices.push_back(Matrix(tensor, parts.back().values()));
      Check(tensor, parts.back().values());
    }
    if (!status_.ok()) return nullptr;
    std::unique_ptr<LinearWeight> packed = Kept(ops_.PackLinear(matrices));
    for (const std::string& name : names) Done(Only(name));
    return packed;
  }

  // The embedding; with `head` the head packed from the matrix, and the embedding that is tied to it.
  std::unique_ptr<EmbeddingTable> Embedding(const std::string& name, std::unique_ptr<LinearWeight>* head) {
    const CheckpointTensor& tensor = Only(name);
    const AlignedTensor aligned(tensor);
    Check(tensor, aligned.values());
    if (!status_.ok()) return nullptr;
    const HostMatrix matrix = Matrix(tensor, aligned.values());
    std::unique_ptr<EmbeddingTable> packed;
    if (head == nullptr) {
      packed = Kept(ops_.PackEmbedding(matrix));
    } else if ((*head = Kept(ops_.PackLinear({&matrix, 1}))) != nullptr) {
      const NumericsProfile& p = ops_.profile();
      // The head's rounding would show in an embedding that is finer, whether now or after an update.
      const bool rounds = p.embedding == DType::kF32 && p.weights == DType::kBF16;
      packed = rounds ? Kept(ops_.PackEmbedding(matrix)) : ops_.TieEmbedding(**head);
    }
    Done(tensor);
    return packed;
  }

  // A small tensor, its parts one after the other, rounded to the dtype in which the trainer holds it.
  std::unique_ptr<VectorWeight> Conv(const std::string& name) {
    return Pack(Rounded(name, ops_.profile().weights), /*exact=*/false);
  }
  std::unique_ptr<VectorWeight> Norm(const std::string& name) {
    const DType dtype = ops_.profile().norm_weights;
    return Pack(Rounded(name, dtype), /*exact=*/dtype == DType::kF32);
  }
  // Computed with in fp32 whatever it is held in.
  std::unique_ptr<VectorWeight> Gate(const std::string& name, DType held) {
    return Pack(Rounded(name, held), /*exact=*/true);
  }

 private:
  // What the backend made, or null and its error kept.
  template <class T>
  std::unique_ptr<T> Kept(absl::StatusOr<std::unique_ptr<T>> made) {
    if (made.ok()) return *std::move(made);
    if (status_.ok()) status_ = made.status();
    return nullptr;
  }

  std::vector<float> Values(const std::string& name) {
    std::vector<float> out;
    for (const CheckpointTensor& tensor : Get(name)) {
      const AlignedTensor aligned(tensor);
      Check(tensor, aligned.values());
      const std::vector<float> values = ToFloat(aligned.values());
      out.insert(out.end(), values.begin(), values.end());
      Done(tensor);
    }
    return out;
  }
  std::vector<float> Rounded(const std::string& name, DType dtype) {
    std::vector<float> out = Values(name);
    if (dtype == DType::kBF16) {
      for (float& value : out) value = RoundBf16(value);
    }
    return out;
  }
  std::unique_ptr<VectorWeight> Pack(const std::vector<float>& values, bool exact) {
    if (!status_.ok()) return nullptr;
    return Kept(ops_.PackVector(values, exact));
  }

  const std::vector<CheckpointTensor>& Get(const std::string& name) const {
    const auto found = tensors_.find(name);
    LOCKSTEP_CHECK(found != tensors_.end(), "tensor {} is loaded but was not resolved", name);
    return found->second;
  }
  const CheckpointTensor& Only(const std::string& name) const {
    LOCKSTEP_CHECK(Get(name).size() == 1, "tensor {} has {} parts", name, Get(name).size());
    return Get(name)[0];
  }

  static HostMatrix Matrix(const CheckpointTensor& tensor, const TensorValues& values) {
    const std::vector<int64_t>& shape = tensor.entry->shape;
    LOCKSTEP_CHECK(shape.size() == 2, "tensor {} is not a matrix", tensor.entry->name);
    return {.data = values.data, .rows = shape[0], .cols = shape[1], .dtype = values.dtype};
  }

  void Check(const CheckpointTensor& tensor, const TensorValues& values) {
    if (!status_.ok()) return;
    const NonFinite found = FindNonFinite(values, ops_.threads());
    if (found.count == 0) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(tensor.file->path().string(), ": tensor \"", tensor.entry->name, "\": ", found.count, " of ",
                     values.count, " values are NaN or infinite, the first at ",
                     PlaceText(tensor.entry->shape, found.first), "; want finite weights"));
  }

  void Done(const CheckpointTensor& tensor) {
    tensor.Drop();
    progress_.Advance(tensor.entry->bytes());
  }

  const ResolvedTensors& tensors_;
  Ops& ops_;
  LoadProgress& progress_;
  absl::Status status_;
};

LayerWeights LoadLayer(Loader& loader, const NumericsProfile& profile, const LayerSpec& spec,
                       const std::string& prefix) {
  LayerWeights layer;
  if (spec.mixer == MixerKind::kGatedDeltaNet) {
    const std::string p = prefix + "linear_attn.";
    layer.gdn.in = loader.Linear({p + "q_proj.weight", p + "k_proj.weight", p + "v_proj.weight", p + "g_proj.weight",
                                  p + "a_proj.weight", p + "b_proj.weight"});
    layer.gdn.o = loader.Linear({p + "o_proj.weight"});
    layer.gdn.conv = loader.Conv(p + "conv1d.weight");
    // transformers creates A_log in fp32 whatever the model's dtype, and keeps what it loads into it in fp32.
    layer.gdn.a_log = loader.Gate(p + "A_log", profile.a_log);
    layer.gdn.dt_bias = loader.Gate(p + "dt_bias", profile.norm_weights);
    layer.gdn.o_norm = loader.Norm(p + "o_norm.weight");
  } else {
    const std::string p = prefix + "self_attn.";
    layer.attention.qkv = loader.Linear({p + "q_proj.weight", p + "k_proj.weight", p + "v_proj.weight"});
    layer.attention.o = loader.Linear({p + "o_proj.weight"});
    layer.attention.q_norm = loader.Norm(p + "q_norm.weight");
    layer.attention.k_norm = loader.Norm(p + "k_norm.weight");
  }
  const bool pre = spec.norm == NormPlacement::kPre;
  layer.mixer_norm = loader.Norm(prefix + (pre ? "input_layernorm.weight" : "post_attention_layernorm.weight"));
  layer.mlp_norm =
      loader.Norm(prefix + (pre ? "post_attention_layernorm.weight" : "post_feedforward_layernorm.weight"));
  layer.gate_up = loader.Linear({prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"});
  layer.down = loader.Linear({prefix + "mlp.down_proj.weight"});
  return layer;
}

int64_t LinearBytes(const std::unique_ptr<LinearWeight>& weight) {
  return weight == nullptr ? 0 : weight->bytes();
}

int64_t LayerBytes(const LayerWeights& layer) {
  int64_t bytes = 0;
  for (const auto* weight :
       {&layer.attention.qkv, &layer.attention.o, &layer.gdn.in, &layer.gdn.o, &layer.gate_up, &layer.down}) {
    bytes += LinearBytes(*weight);
  }
  for (const auto* vector : {&layer.attention.q_norm, &layer.attention.k_norm, &layer.gdn.conv, &layer.gdn.a_log,
                             &layer.gdn.dt_bias, &layer.gdn.o_norm, &layer.mixer_norm, &layer.mlp_norm}) {
    bytes += *vector == nullptr ? 0 : (*vector)->bytes();
  }
  return bytes;
}

}  // namespace

int64_t ModelWeights::bytes() const {
  int64_t total = embedding == nullptr ? 0 : embedding->bytes();
  for (const LayerWeights& layer : layers) total += LayerBytes(layer);
  return total + LinearBytes(head) + (final_norm == nullptr ? 0 : final_norm->bytes());
}

absl::StatusOr<ModelWeights> LoadModelWeights(const std::filesystem::path& dir, const ModelSpec& spec, Ops& ops) {
  if (ops.profile().weights == DType::kF16) {
    return absl::UnimplementedError(absl::StrCat("numerics profile ", std::string(ops.profile().name),
                                                 " holds weights in float16; want bfloat16 or float32"));
  }
  LOCKSTEP_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(dir));
  absl::StatusOr<ResolvedTensors> tensors = ResolveTensors(spec, checkpoint);
  if (!tensors.ok()) {
    return absl::Status(tensors.status().code(), absl::StrCat(dir.string(), ": ", tensors.status().message()));
  }
  uint64_t total = 0;
  for (const auto& [name, parts] : *tensors) {
    for (const CheckpointTensor& part : parts) total += part.entry->bytes();
  }

  LoadProgress progress("loading weights", total);
  Loader loader(*tensors, ops, progress);
  ModelWeights weights;
  weights.embedding = loader.Embedding(kEmbeddingName, spec.tied_embeddings ? &weights.head : nullptr);
  for (size_t i = 0; i < spec.layers.size() && loader.status().ok(); ++i) {
    weights.layers.push_back(LoadLayer(loader, ops.profile(), spec.layers[i], LayerPrefix(static_cast<int64_t>(i))));
  }
  weights.final_norm = loader.Norm("model.norm.weight");
  if (!spec.tied_embeddings) weights.head = loader.Linear({kHeadName});
  LOCKSTEP_RETURN_IF_ERROR(loader.status());
  progress.Finish();
  return weights;
}

}  // namespace lockstep

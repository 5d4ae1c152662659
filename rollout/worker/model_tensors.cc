#include "rollout/worker/model_tensors.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/digest_math.h"
#include "kernels/host_values.h"
#include "rollout/base/check.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "rollout/model/checkpoint.h"
#include "rollout/model/name_map.h"
#include "rollout/model/tensor_resolver.h"
#include "weights_sync/digest.h"

namespace lockstep {
namespace {

constexpr int64_t kBlock = int64_t{1} << 18;  // values converted at a time
constexpr int64_t kAlign = 256;               // bytes; of a slot in the stage
constexpr absl::Duration kInboxWait = absl::Seconds(10);

// Calls visit(values, first) for blocks of the values, converted; `first` is the index of a block's first value.
template <class Visit>
absl::Status ForEachBlock(const std::byte* data, DType from, int64_t count, DType to, Visit visit) {
  std::vector<std::byte> block(std::min(count, kBlock) * DTypeBytes(to));
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t n = std::min(kBlock, count - done);
    ConvertValues(data + done * DTypeBytes(from), from, n, to, block.data());
    LOCKSTEP_RETURN_IF_ERROR(visit(std::span<const std::byte>(block.data(), n * DTypeBytes(to)), done));
  }
  return absl::OkStatus();
}

int64_t Elements(const TensorSlot& slot) {
  int64_t n = 1;
  for (const int64_t d : slot.shape) n *= d;
  return n;
}

}  // namespace

// Walks the model as LoadModelWeights does.
class ModelTensors::Builder {
 public:
  Builder(ModelTensors& table, const ModelSpec& spec, ModelWeights& weights, const NumericsProfile& profile)
      : table_(table), profile_(profile) {
    for (const TensorSpec& tensor : ExpectedTensors(spec)) expected_.emplace(tensor.name, tensor);
    Add(kEmbeddingName, profile.embedding,
        {.embedding = weights.embedding->bytes() > 0 ? weights.embedding.get() : nullptr});
    for (size_t i = 0; i < spec.layers.size(); ++i) {
      Layer(LayerPrefix(static_cast<int64_t>(i)), spec.layers[i], weights.layers[i]);
    }
    Norm("model.norm.weight", *weights.final_norm);
    Linear({kHeadName}, *weights.head);
    if (spec.tied_embeddings) {
      table_.slots_.back().tied_to = 0;
      table_.targets_[0].also = static_cast<int64_t>(table_.slots_.size()) - 1;
    }
    LOCKSTEP_CHECK(table_.slots_.size() == expected_.size(), "{} of {} tensors have a place", table_.slots_.size(),
                   expected_.size());
  }

  int64_t bytes() const { return bytes_; }

 private:
  void Add(const std::string& name, DType held, Target target) {
    const TensorSpec& tensor = expected_.at(name);
    table_.slots_.push_back({.name = name,
                             .shape = tensor.shape,
                             .held = held,
                             .aliases = tensor.aliases,
                             .parts = tensor.parts,
                             .part_rows = tensor.part_rows});
    target.dtype = target.vector != nullptr ? target.vector->dtype() : held;
    target.offset = bytes_;
    bytes_ += (Elements(table_.slots_.back()) * DTypeBytes(target.dtype) + kAlign - 1) / kAlign * kAlign;
    table_.targets_.push_back(target);
  }
  void Linear(const std::vector<std::string>& names, LinearWeight& weight) {
    int64_t row = 0;
    for (const std::string& name : names) {
      Add(name, profile_.weights, {.linear = &weight, .first_row = row});
      row += expected_.at(name).shape[0];
    }
  }
  void Norm(const std::string& name, VectorWeight& weight) { Add(name, profile_.norm_weights, {.vector = &weight}); }

  void Layer(const std::string& prefix, const LayerSpec& spec, LayerWeights& layer) {
    if (spec.mixer == MixerKind::kGatedDeltaNet) {
      const std::string p = prefix + "linear_attn.";
      Linear({p + "q_proj.weight", p + "k_proj.weight", p + "v_proj.weight", p + "g_proj.weight", p + "a_proj.weight",
              p + "b_proj.weight"},
             *layer.gdn.in);
      Linear({p + "o_proj.weight"}, *layer.gdn.o);
      Add(p + "conv1d.weight", profile_.weights, {.vector = layer.gdn.conv.get()});
      Add(p + "A_log", profile_.a_log, {.vector = layer.gdn.a_log.get()});
      Norm(p + "dt_bias", *layer.gdn.dt_bias);
      Norm(p + "o_norm.weight", *layer.gdn.o_norm);
    } else {
      const std::string p = prefix + "self_attn.";
      Linear({p + "q_proj.weight", p + "k_proj.weight", p + "v_proj.weight"}, *layer.attention.qkv);
      Linear({p + "o_proj.weight"}, *layer.attention.o);
      Norm(p + "q_norm.weight", *layer.attention.q_norm);
      Norm(p + "k_norm.weight", *layer.attention.k_norm);
    }
    const bool pre = spec.norm == NormPlacement::kPre;
    Norm(prefix + (pre ? "input_layernorm.weight" : "post_attention_layernorm.weight"), *layer.mixer_norm);
    Norm(prefix + (pre ? "post_attention_layernorm.weight" : "post_feedforward_layernorm.weight"), *layer.mlp_norm);
    Linear({prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"}, *layer.gate_up);
    Linear({prefix + "mlp.down_proj.weight"}, *layer.down);
  }

  ModelTensors& table_;
  const NumericsProfile& profile_;
  std::map<std::string, TensorSpec> expected_;
  int64_t bytes_ = 0;
};

// Pieces go straight to their place in the stage, by the device's own conversion.
class ModelTensors::Inbox final : public TensorInbox {
 public:
  // Whole, or in parts.
  static int64_t MostTensors(std::span<const TensorSlot> slots) {
    int64_t count = 0;
    for (const TensorSlot& slot : slots) count += std::max<int64_t>(1, static_cast<int64_t>(slot.parts.size()));
    return count;
  }

  Inbox(ModelTensors& table, std::unique_ptr<WeightInbox> inbox) : table_(table), inbox_(std::move(inbox)) {}

  int64_t buffer_bytes() const override { return inbox_->buffer_bytes(); }
  std::byte* buffer(int which) override { return inbox_->buffer(which); }
  void* stream() override { return inbox_->stream(); }
  absl::Status UseOnThisThread() override { return inbox_->UseOnThisThread(); }

  absl::Status Open(std::vector<ExpectedTensor> tensors) override {
    for (const ExpectedTensor& tensor : tensors) {
      const TensorSlot& slot = table_.slots_[tensor.slot];
      const bool last = tensor.first_row + tensor.rows == slot.shape[0];
      // What the device reads and counts at once: see InboxValues.
      if (First(tensor) % 4 != 0 || (!last && tensor.rows * Row(tensor) % 4 != 0)) {
        return absl::InvalidArgumentError(
            absl::StrCat("manifest: rows ", tensor.first_row, " to ", tensor.first_row + tensor.rows, " of ", slot.name,
                         " begin or end within a group of 4 values; want the tensor whole, or over the stream"));
      }
    }
    // Only once all are accepted: a refusal leaves what has arrived as it is.
    for (const ExpectedTensor& tensor : tensors) {
      table_.staged_[tensor.slot] = Staged{.touched = true};
      // A tied head's values go where those of what it is tied to are.
      const int64_t tied = table_.slots_[tensor.slot].tied_to;
      if (tied >= 0) table_.staged_[tied].touched = true;
    }
    tensors_ = std::move(tensors);
    return inbox_->Reset();
  }

  absl::Status Acquire(int which) override { return inbox_->Acquire(which); }

  absl::Status Stage(int which, std::span<const ArrivedPiece> pieces) override {
    LOCKSTEP_RETURN_IF_ERROR(inbox_->Arrived());
    for (const ArrivedPiece& piece : pieces) {
      const ExpectedTensor& tensor = tensors_[piece.tensor];
      const TensorSlot& slot = table_.slots_[tensor.slot];
      InboxValues values = {.from = inbox_->buffer(which) + piece.offset,
                            .sent = tensor.dtype,
                            .count = piece.count,
                            .sent_index = piece.index,
                            .held_index = First(tensor) + piece.index,
                            .held = slot.held,
                            .tally = static_cast<int64_t>(piece.tensor)};
      // A tied head brings the values of what it is tied to: Verify compares the two.
      for (const size_t to : table_.WrittenSlots(slot.tied_to >= 0 ? static_cast<size_t>(slot.tied_to) : tensor.slot)) {
        const Target& target = table_.targets_[to];
        values.stored = target.dtype;
        values.to = target.offset + values.held_index * DTypeBytes(target.dtype);
        LOCKSTEP_RETURN_IF_ERROR(inbox_->Store(values, *table_.stage_));
        values.tally = -1;
      }
    }
    return inbox_->Release(which);
  }

  absl::StatusOr<bool> Idle() override { return inbox_->Idle(); }

  absl::StatusOr<std::vector<ArrivedTensor>> Close() override {
    LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<ValueTally> tallies, inbox_->Tallies());
    std::vector<ArrivedTensor> arrived;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const ExpectedTensor& tensor = tensors_[i];
      const TensorSlot& slot = table_.slots_[tensor.slot];
      const int64_t values = tensor.rows * Row(tensor);
      arrived.push_back(
          {.digest = DigestOfSum(tallies[i].sent_sum, static_cast<uint64_t>(values * DTypeBytes(tensor.dtype))),
           .non_finite = static_cast<int64_t>(tallies[i].non_finite)});
      if (slot.tied_to >= 0) continue;
      Staged& staged = table_.staged_[tensor.slot];
      staged.rows += tensor.rows;
      staged.sum += tallies[i].held_sum;
      if (staged.rows < slot.shape[0]) continue;
      staged.digest = DigestOfSum(staged.sum, static_cast<uint64_t>(Elements(slot) * DTypeBytes(slot.held)));
    }
    return arrived;
  }

 private:
  int64_t Row(const ExpectedTensor& tensor) const {
    const TensorSlot& slot = table_.slots_[tensor.slot];
    return Elements(slot) / slot.shape[0];
  }
  int64_t First(const ExpectedTensor& tensor) const { return tensor.first_row * Row(tensor); }

  ModelTensors& table_;
  const std::unique_ptr<WeightInbox> inbox_;
  std::vector<ExpectedTensor> tensors_;
};

// Of the slots that have a place among the weights that serve.
class ModelTensors::Shadow final : public TensorShadow {
 public:
  Shadow(ModelTensors& table, WeightShadow shadow, std::vector<size_t> slots)
      : table_(table), shadow_(std::move(shadow)), slots_(std::move(slots)) {}

  int64_t bytes() const { return shadow_.bytes(); }
  Progress progress() const override { return {.done = shadow_.done(), .total = shadow_.total()}; }

  absl::Status WriteAll() {
    std::vector<size_t> all(slots_.size());
    std::iota(all.begin(), all.end(), 0);
    return shadow_.Write(all, /*cancelled=*/false);
  }

  absl::Status Restore(const std::atomic<bool>& cancelled) override {
    LOCKSTEP_RETURN_IF_ERROR(AwaitInbox());
    LOCKSTEP_RETURN_IF_ERROR(table_.stage_->Finish());
    return shadow_.Restore(Touched(), cancelled);
  }

  absl::Status Write(const std::atomic<bool>& cancelled) override {
    const std::vector<size_t> touched = Touched();
    LOCKSTEP_RETURN_IF_ERROR(shadow_.Write(touched, cancelled));
    // The next update's Begin waits for this: staged_ is as the commit left it.
    for (const size_t t : touched) {
      const TensorSlot& slot = table_.slots_[slots_[t]];
      if (slot.tied_to >= 0) continue;
      LOCKSTEP_ASSIGN_OR_RETURN(const uint64_t digest, HeldDigest(t));
      if (digest != table_.staged_[slots_[t]].digest) {
        return absl::DataLossError(absl::StrCat(slot.name, ": what serves has not the digest of what arrived"));
      }
    }
    return absl::OkStatus();
  }

 private:
  // Of the shadow's tensor `t` as digests count it: its values in the dtype in which they are held.
  absl::StatusOr<uint64_t> HeldDigest(size_t t) const {
    const TensorSlot& slot = table_.slots_[slots_[t]];
    const DType stored = table_.targets_[slots_[t]].dtype;
    if (stored == slot.held) return shadow_.digest(t);
    Digester digester;
    LOCKSTEP_RETURN_IF_ERROR(ForEachBlock(shadow_.data(t), stored, Elements(slot), slot.held,
                                          [&](std::span<const std::byte> values, int64_t) {
                                            digester.Add(values);
                                            return absl::OkStatus();
                                          }));
    return digester.Finish();
  }

  // Indices of the shadow's tensors whose values the update has, or may have, written.
  std::vector<size_t> Touched() const {
    std::vector<size_t> touched;
    for (size_t t = 0; t < slots_.size(); ++t) {
      const int64_t tied = table_.slots_[slots_[t]].tied_to;
      if (table_.staged_[slots_[t]].touched || (tied >= 0 && table_.staged_[tied].touched)) touched.push_back(t);
    }
    return touched;
  }

  // Of a receive that was dropped, conversions may be under way.
  absl::Status AwaitInbox() {
    if (table_.inbox_ == nullptr) return absl::OkStatus();
    for (const absl::Time deadline = absl::Now() + kInboxWait; absl::Now() < deadline;
         absl::SleepFor(absl::Milliseconds(1))) {
      LOCKSTEP_ASSIGN_OR_RETURN(const bool idle, table_.inbox_->Idle());
      if (idle) return absl::OkStatus();
    }
    return absl::DeadlineExceededError(
        absl::StrCat("the dropped receive's values still arrive after ", absl::FormatDuration(kInboxWait)));
  }

  ModelTensors& table_;
  WeightShadow shadow_;
  const std::vector<size_t> slots_;  // by tensor of the shadow
};

ModelTensors::ModelTensors(std::filesystem::path dir, const ModelSpec& spec, Ops& ops)
    : dir_(std::move(dir)), loaded_(FilesIn(dir_)), spec_(spec), ops_(ops) {}

std::map<std::filesystem::path, ModelTensors::FileStamp> ModelTensors::FilesIn(const std::filesystem::path& dir) {
  std::map<std::filesystem::path, FileStamp> files;
  std::error_code error;
  for (std::filesystem::directory_iterator file(dir, error), end; !error && file != end; file.increment(error)) {
    if (file->path().extension() != ".safetensors") continue;
    files[file->path()] = {.size = file->file_size(error), .written = file->last_write_time(error)};
  }
  return files;
}

absl::Status ModelTensors::MakeStage(int64_t bytes, bool direct) {
  if (!direct) {
    LOCKSTEP_ASSIGN_OR_RETURN(stage_, ops_.MakeWeightStage(bytes));
    return absl::OkStatus();
  }
  std::vector<WeightPlace> places;
  std::vector<WeightShadow::Tensor> tensors;
  std::vector<size_t> slots;
  for (size_t s = 0; s < slots_.size(); ++s) {
    const Target& target = targets_[s];
    if (!target.placed()) continue;
    const int64_t rows = target.vector != nullptr ? Elements(slots_[s]) : slots_[s].shape[0];
    places.push_back({.linear = target.linear,
                      .first_row = target.first_row,
                      .embedding = target.embedding,
                      .vector = target.vector,
                      .rows = rows,
                      .cols = Elements(slots_[s]) / rows,
                      .dtype = target.dtype,
                      .offset = target.offset});
    tensors.push_back({.name = slots_[s].name, .offset = target.offset, .bytes = places.back().bytes()});
    slots.push_back(s);
  }
  LOCKSTEP_ASSIGN_OR_RETURN(std::unique_ptr<LiveWeights> live, ops_.MakeLiveWeights(places));
  LOCKSTEP_ASSIGN_OR_RETURN(WeightShadow shadow, WeightShadow::Create(live.get(), std::move(tensors)));
  live_ = live.get();
  stage_ = std::move(live);
  shadow_ = std::make_unique<Shadow>(*this, std::move(shadow), std::move(slots));
  return shadow_->WriteAll();
}

absl::StatusOr<std::unique_ptr<ModelTensors>> ModelTensors::Create(const std::filesystem::path& dir,
                                                                   const ModelSpec& spec, ModelWeights& weights,
                                                                   Ops& ops, const Options& options) {
  std::unique_ptr<ModelTensors> table(new ModelTensors(dir, spec, ops));
  const Builder builder(*table, spec, weights, ops.profile());
  table->staged_.resize(table->slots_.size());
  {
    absl::MutexLock lock(&table->mutex_);
    table->digests_.resize(table->slots_.size());
  }
  LOCKSTEP_RETURN_IF_ERROR(table->MakeStage(builder.bytes(), options.direct));
  if (options.inbox_bytes > 0) {
    LOCKSTEP_ASSIGN_OR_RETURN(std::unique_ptr<WeightInbox> inbox,
                              ops.MakeWeightInbox(options.inbox_bytes, Inbox::MostTensors(table->slots_)));
    table->inbox_ = std::make_unique<Inbox>(*table, std::move(inbox));
  }
  return table;
}

ModelTensors::~ModelTensors() = default;

int64_t ModelTensors::inbox_bytes() const {
  return inbox_ == nullptr ? 0 : 2 * inbox_->buffer_bytes();
}

int64_t ModelTensors::shadow_bytes() const {
  return shadow_ == nullptr ? 0 : shadow_->bytes();
}

TensorShadow* ModelTensors::shadow() {
  return shadow_.get();
}

void ModelTensors::BeginUpdate() {
  std::fill(staged_.begin(), staged_.end(), Staged());
}

std::vector<size_t> ModelTensors::WrittenSlots(size_t slot) const {
  std::vector<size_t> written;
  for (int64_t s = static_cast<int64_t>(slot); s >= 0; s = targets_[s].also) {
    if (live_ == nullptr || targets_[s].placed()) written.push_back(static_cast<size_t>(s));
  }
  return written;
}

absl::Status ModelTensors::WriteValues(size_t slot, const std::byte* data, DType dtype, int64_t count) {
  for (const size_t s : WrittenSlots(slot)) {
    const Target& target = targets_[s];
    if (dtype == target.dtype) {
      LOCKSTEP_RETURN_IF_ERROR(stage_->Write(target.offset, {data, static_cast<size_t>(count * DTypeBytes(dtype))}));
      continue;
    }
    LOCKSTEP_RETURN_IF_ERROR(
        ForEachBlock(data, dtype, count, target.dtype, [&](std::span<const std::byte> values, int64_t at) {
          return stage_->Write(target.offset + at * DTypeBytes(target.dtype), values);
        }));
  }
  return absl::OkStatus();
}

absl::Status ModelTensors::Stage(const ArrivedRows& rows) {
  const TensorSlot& slot = slots_[rows.slot];
  if (slot.tied_to >= 0) return absl::OkStatus();  // came, or comes, with what it is tied to
  Staged& staged = staged_[rows.slot];
  if (staged.rows == 0 && rows.rows == slot.shape[0] && rows.dtype == slot.held) {  // as it is held, at once
    staged.rows = rows.rows;
    staged.digest = rows.digest;
    staged.touched = true;
    return WriteValues(rows.slot, rows.data, rows.dtype, Elements(slot));
  }
  const int64_t row = Elements(slot) / slot.shape[0], count = rows.rows * row, bytes = DTypeBytes(slot.held);
  // Rounded to the held dtype first, and from there to the dtype of the stage, which holds it exactly.
  std::vector<std::byte>& held = staged.parts;
  if (staged.rows > 0 && held.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(slot.name, ": some of the parts it comes in arrived in a Receive; want the others there too"));
  }
  held.resize(Elements(slot) * bytes);
  ConvertValues(rows.data, rows.dtype, count, slot.held, held.data() + rows.first_row * row * bytes);
  staged.rows += rows.rows;
  if (staged.rows < slot.shape[0]) return absl::OkStatus();
  staged.digest = Digest(held);
  staged.touched = true;
  absl::Status written = WriteValues(rows.slot, held.data(), slot.held, Elements(slot));
  std::vector<std::byte>().swap(held);
  return written;
}

absl::Status ModelTensors::Finish() {
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (staged_[s].rows == 0 || staged_[s].digest) continue;
    return absl::FailedPreconditionError(
        absl::StrCat(slots_[s].name, ": the parts it comes in arrived in different receives; want them in one"));
  }
  return stage_->Finish();
}

absl::Status ModelTensors::Install(const WeightVersion& version) {
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.install.before"));
  for (size_t s = 0; s < slots_.size() && live_ == nullptr; ++s) {
    const size_t source = slots_[s].tied_to >= 0 ? static_cast<size_t>(slots_[s].tied_to) : s;
    if (!staged_[source].digest) continue;
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.install.slot"));
    const Target& target = targets_[s];
    const std::byte* from = stage_->Address(target.offset, Elements(slots_[s]) * DTypeBytes(target.dtype));
    if (target.vector != nullptr) {
      ops_.StoreVector(from, *target.vector);
      continue;
    }
    const HostMatrix matrix{from, slots_[s].shape[0], slots_[s].shape[1], target.dtype};
    if (target.linear != nullptr) ops_.StoreLinear(matrix, target.first_row, *target.linear);
    if (target.embedding != nullptr) ops_.StoreEmbedding(matrix, *target.embedding);
  }
  ops_.Synchronize();
  LOCKSTEP_RETURN_IF_ERROR(ops_.status());
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.install.after"));
  absl::MutexLock lock(&mutex_);
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (staged_[s].digest) digests_[s] = staged_[s].digest;
  }
  version_ = version;
  return absl::OkStatus();
}

absl::StatusOr<VersionDigests> ModelTensors::ServingDigests() {
  LOCKSTEP_RETURN_IF_ERROR(ReadDigests());
  absl::MutexLock lock(&mutex_);
  VersionDigests serving = {.version = version_, .digests = {}};
  for (size_t s = 0; s < slots_.size(); ++s) {
    serving.digests.push_back(*digests_[slots_[s].tied_to >= 0 ? static_cast<size_t>(slots_[s].tied_to) : s]);
  }
  return serving;
}

absl::Status ModelTensors::ReadDigests() {
  // Who comes second finds what the first has read. Install, on the step loop's thread, waits for neither.
  absl::MutexLock reading(&reading_);
  std::vector<size_t> missing;
  {
    absl::MutexLock lock(&mutex_);
    for (size_t s = 0; s < slots_.size(); ++s) {
      if (!digests_[s] && slots_[s].tied_to < 0) missing.push_back(s);
    }
  }
  if (missing.empty()) return absl::OkStatus();
  const auto unreadable = [&](const absl::Status& status) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the checkpoint at ", dir_.string(), ", whose weights serve, cannot be read any more: ", status.message()));
  };
  // Those of other weights would be worse than none.
  const auto check_unchanged = [&] {
    if (FilesIn(dir_) == loaded_) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoint at ", dir_.string(), " has changed since the worker loaded it, so the digests of ",
                     missing.size(),
                     " tensors that no update has brought are not known; want files that stay, or an update of all"));
  };
  LOCKSTEP_RETURN_IF_ERROR(check_unchanged());
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(dir_);
  if (!checkpoint.ok()) return unreadable(checkpoint.status());
  const absl::StatusOr<ResolvedTensors> tensors = ResolveTensors(spec_, *checkpoint);
  if (!tensors.ok()) return unreadable(tensors.status());
  std::vector<uint64_t> read;
  for (const size_t s : missing) {
    Digester digester;
    for (const CheckpointTensor& tensor : tensors->at(slots_[s].name)) {
      LOCKSTEP_RETURN_IF_ERROR(ForEachBlock(tensor.data(), *tensor.entry->dtype, tensor.entry->elements, slots_[s].held,
                                            [&](std::span<const std::byte> values, int64_t) {
                                              digester.Add(values);
                                              return absl::OkStatus();
                                            }));
      tensor.Drop();
    }
    read.push_back(digester.Finish());
  }
  LOCKSTEP_RETURN_IF_ERROR(check_unchanged());
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < missing.size(); ++i) {
    std::optional<uint64_t>& digest = digests_[missing[i]];
    if (!digest) digest = read[i];  // else an update has replaced it meanwhile
  }
  return absl::OkStatus();
}

}  // namespace lockstep

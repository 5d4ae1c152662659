// A model's weights as a TensorTable: what an update's tensors are checked against, staged beside the weights that
// serve, and stored into them between two steps, at the addresses they have.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/ops.h"
#include "rollout/model/spec.h"
#include "rollout/model/weights.h"
#include "weights_sync/tensor_table.h"

namespace lockstep {

class ModelTensors final : public TensorTable {
 public:
  // `dir`: the checkpoint that `weights` were loaded from. All but `dir` must outlive it. RESOURCE_EXHAUSTED if there
  // is no memory for a second set of weights and for the inbox: two buffers of `inbox_bytes`, a multiple of 256; 0:
  // none.
  static absl::StatusOr<std::unique_ptr<ModelTensors>> Create(const std::filesystem::path& dir, const ModelSpec& spec,
                                                              ModelWeights& weights, Ops& ops, int64_t inbox_bytes);
  ~ModelTensors() override;

  std::span<const TensorSlot> slots() const override { return slots_; }
  void BeginUpdate() override;
  absl::Status Stage(const ArrivedRows& rows) override;
  TensorInbox* inbox() override { return inbox_.get(); }
  absl::Status Finish() override;
  // Those of slots that no update has changed are computed from the checkpoint's files, which takes a while the first
  // time; FAILED_PRECONDITION if they are gone.
  absl::StatusOr<std::vector<uint64_t>> ServingDigests() override;

  // Stores what is staged into the weights that serve. On the step loop's thread, between two steps.
  absl::Status Install();

  int64_t staging_bytes() const { return stage_->bytes(); }
  int64_t inbox_bytes() const;

 private:
  // Where a slot's values go. `dtype`: in the stage.
  struct Target {
    LinearWeight* linear = nullptr;  // rows from first_row on
    int64_t first_row = 0;
    EmbeddingTable* embedding = nullptr;
    VectorWeight* vector = nullptr;
    DType dtype = DType::kF32;
    int64_t offset = 0;  // in the stage
    int64_t also = -1;   // another slot that takes the same values: a tied head
  };
  // What an update has staged of a slot.
  struct Staged {
    int64_t rows = 0;
    std::vector<std::byte> parts;    // in the held dtype, where the slot comes in parts
    uint64_t sum = 0;                // of the digest, where it comes through the inbox
    std::optional<uint64_t> digest;  // once it is whole
  };
  class Builder;
  class Inbox;

  ModelTensors(std::filesystem::path dir, const ModelSpec& spec, Ops& ops)
      : dir_(std::move(dir)), spec_(spec), ops_(ops) {}
  // Writes whole values of the slot, in `dtype`, to its place in the stage, and to that of a tied one.
  absl::Status WriteValues(size_t slot, const std::byte* data, DType dtype, int64_t count);

  const std::filesystem::path dir_;
  const ModelSpec& spec_;
  Ops& ops_;
  std::vector<TensorSlot> slots_;
  std::vector<Target> targets_;  // by slot, as is the next
  std::vector<Staged> staged_;
  std::unique_ptr<WeightStage> stage_;
  std::unique_ptr<TensorInbox> inbox_;
  absl::Mutex mutex_;
  std::vector<std::optional<uint64_t>> digests_ ABSL_GUARDED_BY(mutex_);  // by slot; nullopt: still the checkpoint's
};

}  // namespace lockstep

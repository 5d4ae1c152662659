// A model's weights as a TensorTable: what an update's tensors are checked against, staged beside the weights that
// serve, and stored into them between two steps, at the addresses they have; or, direct, written there as they arrive,
// with a shadow of what they overwrite.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <map>
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
#include "rollout/worker/weight_shadow.h"
#include "weights_sync/tensor_table.h"

namespace lockstep {

enum class WeightsReceive : uint8_t { kOff, kStaged, kDirect };

class ModelTensors final : public TensorTable {
 public:
  struct Options {
    bool direct = false;
    int64_t inbox_bytes = 0;  // of each of two buffers, a multiple of 256; 0: no inbox
  };
  // `dir`: the checkpoint that `weights` were loaded from. All but `dir` must outlive it. RESOURCE_EXHAUSTED if there
  // is no memory for a second set of weights (direct: on the host, where it is written at once) and for the inbox.
  static absl::StatusOr<std::unique_ptr<ModelTensors>> Create(const std::filesystem::path& dir, const ModelSpec& spec,
                                                              ModelWeights& weights, Ops& ops, const Options& options);
  ~ModelTensors() override;

  std::span<const TensorSlot> slots() const override { return slots_; }
  void BeginUpdate() override;
  TensorShadow* shadow() override;
  absl::Status Stage(const ArrivedRows& rows) override;
  TensorInbox* inbox() override { return inbox_.get(); }
  absl::Status Finish() override;
  // Those of slots that no update has changed are computed from the checkpoint's files, which takes a while the first
  // time; FAILED_PRECONDITION if they are gone.
  absl::StatusOr<VersionDigests> ServingDigests() override;

  // Makes what is staged serve, as `version`: stores it into the weights that do. On the step loop's thread, between
  // two steps.
  absl::Status Install(const WeightVersion& version);

  int64_t staging_bytes() const { return live_ == nullptr ? stage_->bytes() : 0; }
  int64_t shadow_bytes() const;
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

    // Among the weights that serve; a tied embedding is none of its own.
    bool placed() const { return linear != nullptr || embedding != nullptr || vector != nullptr; }
  };
  // What an update has staged of a slot.
  struct Staged {
    bool touched = false;  // values of it are written, or may be
    int64_t rows = 0;
    std::vector<std::byte> parts;    // in the held dtype, where the slot comes in parts
    uint64_t sum = 0;                // of the digest, where it comes through the inbox
    std::optional<uint64_t> digest;  // once it is whole
  };
  class Builder;
  class Inbox;
  class Shadow;

  // Tells a file from one that has taken its place.
  struct FileStamp {
    uintmax_t size;
    std::filesystem::file_time_type written;

    bool operator==(const FileStamp&) const = default;
  };
  static std::map<std::filesystem::path, FileStamp> FilesIn(const std::filesystem::path& dir);

  ModelTensors(std::filesystem::path dir, const ModelSpec& spec, Ops& ops);
  absl::Status MakeStage(int64_t bytes, bool direct);
  // Where values of the slot go: its place in the stage, and that of a tied one.
  std::vector<size_t> WrittenSlots(size_t slot) const;
  // Writes whole values of the slot, in `dtype`, there.
  absl::Status WriteValues(size_t slot, const std::byte* data, DType dtype, int64_t count);

  // Of slots that no update has changed, from the checkpoint's files.
  absl::Status ReadDigests();

  const std::filesystem::path dir_;
  const std::map<std::filesystem::path, FileStamp> loaded_;  // the files there when this was made
  const ModelSpec& spec_;
  Ops& ops_;
  std::vector<TensorSlot> slots_;
  std::vector<Target> targets_;  // by slot, as is the next
  std::vector<Staged> staged_;
  std::unique_ptr<WeightStage> stage_;
  LiveWeights* live_ = nullptr;  // stage_, where it is the weights that serve
  std::unique_ptr<Shadow> shadow_;
  std::unique_ptr<TensorInbox> inbox_;
  absl::Mutex reading_;  // the checkpoint's files, which takes a while
  absl::Mutex mutex_;
  // By slot; nullopt: still the checkpoint's, or as what it is tied to.
  std::vector<std::optional<uint64_t>> digests_ ABSL_GUARDED_BY(mutex_);
  WeightVersion version_ ABSL_GUARDED_BY(mutex_);  // of which they are
};

}  // namespace lockstep

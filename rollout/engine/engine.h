// The engine runs a step: rows in, tokens and log-probabilities out. It owns what the step needs on the device: KV
// pages, state slots and activations. Used by one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/engine/memory.h"
#include "rollout/model/forward.h"
#include "rollout/model/spec.h"
#include "rollout/model/weights.h"
#include "sampler/sampler.h"

namespace lockstep {

struct EngineConfig {
  int64_t page_size = 64;  // positions in a KV page
  int64_t slots = 64;      // sequences with a state at once
  int64_t pages = 0;       // KV pages; 0 only for a model without attention
  int64_t max_rows = 512;  // of one step
};

// What start-up plans to hold, in bytes; printed as a table and reported by GetInfo.
struct MemoryPlan {
  int64_t weights = 0;
  int64_t activations = 0;
  int64_t kv_page = 0;      // one page over all layers
  int64_t kv_pages = 0;     // count
  int64_t state_slot = 0;   // one sequence
  int64_t state_slots = 0;  // count
  int64_t total() const { return weights + activations + kv_page * kv_pages + state_slot * state_slots; }
};

// A piece of one sequence, in the scheduler's terms.
struct EnginePiece {
  int64_t position = 0;
  std::span<const int32_t> tokens;  // the piece's rows
  int32_t slot = -1;
  std::span<const int32_t> pages;  // the sequence's page table
};

struct StateCopy {
  int32_t from_slot = -1, to_slot = -1;
  int32_t from_page = -1, to_page = -1;  // -1: none
};

// What to make of one row's logits. Several tasks may name one row (samples that fork from it).
struct RowTask {
  int64_t piece = 0;  // index into StepInput::pieces
  int64_t row = 0;    // within the piece
  const SamplingParams* params = nullptr;
  const LogprobOptions* options = nullptr;
  const TokenHistory* history = nullptr;
  DrawKey key;          // sampling
  bool forced = false;  // score `forced_token` instead of sampling
  int32_t forced_token = 0;
};

struct StepInput {
  std::span<const int32_t> reset_slots;  // cleared first
  std::span<const EnginePiece> pieces;
  std::span<const RowTask> tasks;
  std::span<const StateCopy> copies;  // made last
};

class Engine {
 public:
  // All must outlive it. RESOURCE_EXHAUSTED if the memory cannot be mapped.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const ModelSpec& spec, const ModelWeights& weights, Ops& ops,
                                                        const EngineConfig& config);

  // Returns one result per task, in order: the token drawn (or forced) with its log-probabilities.
  std::vector<absl::StatusOr<SampledToken>> Step(const StepInput& input);

  const MemoryPlan& memory() const { return memory_; }
  const EngineConfig& config() const { return config_; }

 private:
  Engine(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, const EngineConfig& config);
  std::byte* slot(int32_t index) { return states_.data() + index * layout_.bytes; }
  void ResetSlot(int32_t index);
  void Copy(const StateCopy& copy);
  void RunTasks(const StepInput& input, std::span<const int64_t> first_row,
                std::vector<absl::StatusOr<SampledToken>>& results);

  const ModelSpec& spec_;
  Ops& ops_;
  EngineConfig config_;
  StateLayout layout_;
  ForwardPass forward_;
  Arena states_;
  Arena kv_;
  std::vector<KvLayer> kv_layers_;  // by layer; base is null for GDN layers
  MemoryPlan memory_;
  std::vector<SamplerScratch> scratch_;  // by thread
  std::vector<int32_t> tokens_;
  std::vector<int64_t> positions_;
  std::vector<SequencePiece> pieces_;
};

}  // namespace lockstep

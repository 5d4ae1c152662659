// The engine runs a step: rows in, tokens and log-probabilities out. It owns what the step needs on the device: KV
// pages, state slots and activations. Used by one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/ops.h"
#include "rollout/engine/backend.h"
#include "rollout/model/forward.h"
#include "rollout/model/spec.h"
#include "rollout/model/weights.h"
#include "sampler/row_sampler.h"
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
  int64_t workspace = 0;    // left to the backend's intermediate results
  int64_t kv_page = 0;      // one page over all layers
  int64_t kv_pages = 0;     // count
  int64_t state_slot = 0;   // one sequence
  int64_t state_slots = 0;  // count
  int64_t token_lists = 0;  // of one request: allowed_token_ids and logit_bias, in a place of its own for each slot
  int64_t total() const {
    return weights + activations + workspace + kv_page * kv_pages + (state_slot + token_lists) * state_slots;
  }
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

// A sequence's state in its slot and pages, and in host memory.
struct StateSwap {
  int32_t slot = -1;
  std::span<const int32_t> pages;
  std::vector<std::byte>* host = nullptr;
};

struct StepInput {
  std::span<const StateSwap> saves;      // to host memory, before anything else
  std::span<const int32_t> reset_slots;  // cleared next
  std::span<const StateSwap> restores;   // then from host memory
  std::span<const EnginePiece> pieces;   // none: states are moved only
  std::span<const RowTask> tasks;        // in the order of the rows they stand on
  std::span<const StateCopy> copies;     // made last
};

class Engine {
 public:
  ~Engine();
  // All must outlive it. RESOURCE_EXHAUSTED if the device's memory does not suffice.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const ModelSpec& spec, const ModelWeights& weights,
                                                        Backend& backend, const EngineConfig& config);

  // Before the first Step() of a thread that did not make the engine.
  absl::Status UseOnThisThread() { return ops_.UseOnThisThread(); }

  // Returns one result per task, in order: the token drawn (or forced) with its log-probabilities. An error of the step
  // itself is the device's, or its sampler's, and names the operation: nothing can be computed after it. `meanwhile` is
  // called once: where the device runs by itself, when it has all of the step's work; else before that work.
  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Step(
      const StepInput& input, absl::FunctionRef<void()> meanwhile = [] {});

  // A new RowTask::request, and its end: no task of a later step is of it. Between steps.
  uint64_t BeginRequest() { return ++requests_; }
  void EndRequest(uint64_t request) { sampler_->Forget(request); }

  // When the last step with rows was handed to the device: its batch, before its operations.
  absl::Time begun() const { return begun_; }

  // Records every operation of the steps that follow; null: none. Only with a backend that does not replay steps.
  void set_trace(Trace* trace);

  const MemoryPlan& memory() const { return memory_; }
  const EngineConfig& config() const { return config_; }

 private:
  Engine(const ModelSpec& spec, Ops& ops, const EngineConfig& config);
  void ResetSlot(int32_t index);
  void Copy(const StateCopy& copy);
  // The slot and the pages' parts of every layer, in a fixed order.
  void ForEachPart(const StateSwap& swap, absl::FunctionRef<void(std::byte* part, int64_t bytes)> visit) const;
  void Save(const StateSwap& swap);
  void Restore(const StateSwap& swap);
  // Which rows' logits the tasks need (logit_rows_, logits_index_).
  void PlanLogits(const StepInput& input);
  // Samples the tasks of logit rows [begin, end) from the block of logits that begins at row `begin`.
  void Sample(const StepInput& input, Rows logits, int64_t begin, int64_t end);

  const ModelSpec& spec_;
  Ops& ops_;
  EngineConfig config_;
  StateLayout layout_;
  std::unique_ptr<ForwardPass> forward_;
  std::unique_ptr<RowSampler> sampler_;
  std::unique_ptr<DeviceMemory> states_;
  std::unique_ptr<DeviceMemory> kv_;
  std::vector<KvLayer> kv_layers_;      // by layer; base is null for GDN layers
  std::vector<GdnLayer> state_layers_;  // by layer; base is null for attention layers
  MemoryPlan memory_;
  Trace* trace_ = nullptr;
  absl::Time begun_ = absl::InfinitePast();
  uint64_t requests_ = 0;  // begun so far
  // The step in preparation; members to keep their memory from step to step.
  std::vector<int32_t> tokens_;
  std::vector<int64_t> positions_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> logit_rows_;    // distinct rows of tasks, ascending
  std::vector<int64_t> logits_index_;  // by task: index into logit_rows_
  std::vector<SampleTask> sample_tasks_;
};

}  // namespace lockstep

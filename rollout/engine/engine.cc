#include "rollout/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "rollout/base/check.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"

namespace lockstep {

Engine::Engine(const ModelSpec& spec, Ops& ops, const EngineConfig& config)
    : spec_(spec), ops_(ops), config_(config), layout_(MakeStateLayout(spec, ops)) {}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const ModelSpec& spec, const ModelWeights& weights,
                                                       Backend& backend, const EngineConfig& config) {
  Ops& ops = backend.ops();
  LOCKSTEP_CHECK(config.slots >= 1 && config.max_rows >= 1 && config.page_size >= 1 &&
                     config.page_size % ops.kv_page_multiple() == 0,
                 "slots {}, max_rows {}, page_size {}", config.slots, config.max_rows, config.page_size);
  std::unique_ptr<Engine> engine(new Engine(spec, ops, config));
  LOCKSTEP_ASSIGN_OR_RETURN(engine->forward_, ForwardPass::Create(spec, weights, ops, config.max_rows));
  LOCKSTEP_ASSIGN_OR_RETURN(engine->sampler_, backend.MakeSampler(spec.vocab_size, config.slots));
  engine->memory_ = {.weights = weights.bytes(),
                     .activations = engine->forward_->buffer_bytes(),
                     .workspace = ops.reserved_memory(),
                     .kv_page = KvBytesPerPage(spec, ops, config.page_size),
                     .kv_pages = config.pages,
                     .state_slot = engine->layout_.bytes,
                     .state_slots = config.slots,
                     .token_lists = backend.SamplerBytesPerRequest(spec.vocab_size)};
  LOCKSTEP_ASSIGN_OR_RETURN(engine->states_, ops.Allocate(engine->layout_.bytes * config.slots));
  LOCKSTEP_ASSIGN_OR_RETURN(engine->kv_, ops.Allocate(engine->memory_.kv_page * config.pages));
  std::byte* base = engine->kv_->data();
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    KvLayer kv;
    GdnLayer state;
    if (layer.mixer == MixerKind::kGatedDeltaNet) {
      state = {engine->states_->data() + engine->layout_.offsets[i], engine->layout_.bytes};
    } else {
      kv = {base, config.page_size, config.pages};
      base += ops.KvPageBytes(layer.attention, config.page_size) * config.pages;
    }
    engine->kv_layers_.push_back(kv);
    engine->state_layers_.push_back(state);
  }
  return engine;
}

Engine::~Engine() {
  ops_.ForgetSteps(this);
}

void Engine::set_trace(Trace* trace) {
  trace_ = trace;
  forward_->set_trace(trace);
}

void Engine::ResetSlot(int32_t index) {
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    if (state_layers_[i].base != nullptr) ops_.GdnResetState(spec_.layers[i].gdn, state_layers_[i], index);
  }
}

void Engine::Copy(const StateCopy& copy) {
  if (layout_.bytes > 0) {
    ops_.Copy(states_->data() + copy.to_slot * layout_.bytes, states_->data() + copy.from_slot * layout_.bytes,
              layout_.bytes);
  }
  if (copy.from_page < 0) return;
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    if (kv_layers_[i].base == nullptr) continue;
    const int64_t bytes = ops_.KvPageBytes(spec_.layers[i].attention, config_.page_size);
    ops_.Copy(kv_layers_[i].base + copy.to_page * bytes, kv_layers_[i].base + copy.from_page * bytes, bytes);
  }
}

void Engine::ForEachPart(const StateSwap& swap, absl::FunctionRef<void(std::byte*, int64_t)> visit) const {
  if (layout_.bytes > 0) visit(states_->data() + swap.slot * layout_.bytes, layout_.bytes);
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    if (kv_layers_[i].base == nullptr) continue;
    const int64_t bytes = ops_.KvPageBytes(spec_.layers[i].attention, config_.page_size);
    for (const int32_t page : swap.pages) visit(kv_layers_[i].base + page * bytes, bytes);
  }
}

void Engine::Save(const StateSwap& swap) {
  Failpoint("keep.swap_out.before");
  int64_t total = 0;
  ForEachPart(swap, [&](std::byte*, int64_t bytes) { total += bytes; });
  swap.host->resize(total);
  std::byte* to = swap.host->data();
  ForEachPart(swap, [&](std::byte* part, int64_t bytes) {
    ops_.CopyToHost(to, part, bytes);
    to += bytes;
  });
  Failpoint("keep.swap_out.after");
}

void Engine::Restore(const StateSwap& swap) {
  Failpoint("keep.swap_in.before");
  const std::byte* from = swap.host->data();
  ForEachPart(swap, [&](std::byte* part, int64_t bytes) {
    ops_.CopyFromHost(part, from, bytes);
    from += bytes;
  });
  LOCKSTEP_CHECK(from == swap.host->data() + swap.host->size(), "a saved state of {} bytes", swap.host->size());
  std::vector<std::byte>().swap(*swap.host);
  Failpoint("keep.swap_in.after");
}

absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Engine::Step(const StepInput& input,
                                                                       absl::FunctionRef<void()> meanwhile) {
  const bool first = !ops_.runs_by_itself() || input.pieces.empty();
  if (first) meanwhile();
  for (const StateSwap& swap : input.saves) Save(swap);
  for (int32_t s : input.reset_slots) ResetSlot(s);
  for (const StateSwap& swap : input.restores) Restore(swap);
  if (input.pieces.empty()) {
    LOCKSTEP_RETURN_IF_ERROR(ops_.status());
    return std::vector<absl::StatusOr<SampledToken>>();
  }
  tokens_.clear();
  positions_.clear();
  pieces_.clear();
  for (const EnginePiece& piece : input.pieces) {
    const int64_t count = static_cast<int64_t>(piece.tokens.size());
    pieces_.push_back({.row_begin = static_cast<int64_t>(tokens_.size()),
                       .row_count = count,
                       .position = piece.position,
                       .page_table = piece.pages.data(),
                       .slot = piece.slot});
    tokens_.insert(tokens_.end(), piece.tokens.begin(), piece.tokens.end());
    for (int64_t i = 0; i < count; ++i) positions_.push_back(piece.position + i);
  }
  PlanLogits(input);

  const StepRows padded =
      ops_.BeginStep({tokens_, positions_, pieces_, logit_rows_, kv_->bytes() > 0 ? config_.page_size : 0});
  begun_ = absl::Now();
  if (trace_ != nullptr) trace_->BeginStep(positions_, logit_rows_);
  ops_.RunStep(this, [&] {
    forward_->Run(padded.rows, kv_layers_, state_layers_);
    if (padded.logit_rows > 0) forward_->Logits(0, padded.logit_rows);
  });
  // Logits for a block of rows at a time, so that prompt log-probabilities of a long piece need no [rows, vocab]
  // buffer.
  const int64_t count = static_cast<int64_t>(logit_rows_.size()), block = ops_.max_logit_rows();
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(begin + block, count);
    const Rows logits = begin == 0 ? forward_->logits(padded.logit_rows) : forward_->Logits(begin, end - begin);
    Sample(input, logits, begin, end);
  }
  for (const StateCopy& copy : input.copies) Copy(copy);
  if (!first) meanwhile();

  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> sampled = sampler_->Collect();
  // The tasks' results came after everything else but the copies.
  const bool done = sampled.ok() && !input.tasks.empty() && input.copies.empty();
  if (!done) ops_.Synchronize();
  // The operation that failed, where one did: the sampler can only say that it saw it.
  LOCKSTEP_RETURN_IF_ERROR(ops_.status());
  return sampled;
}

void Engine::PlanLogits(const StepInput& input) {
  logit_rows_.clear();
  logits_index_.clear();
  for (const RowTask& task : input.tasks) {
    const int64_t row = pieces_[task.piece].row_begin + task.row;
    LOCKSTEP_CHECK(logit_rows_.empty() || logit_rows_.back() <= row, "a task of row {} after one of row {}", row,
                   logit_rows_.back());
    if (logit_rows_.empty() || logit_rows_.back() != row) logit_rows_.push_back(row);
    logits_index_.push_back(static_cast<int64_t>(logit_rows_.size()) - 1);
  }
}

void Engine::Sample(const StepInput& input, Rows logits, int64_t begin, int64_t end) {
  sample_tasks_.clear();
  const auto first = std::lower_bound(logits_index_.begin(), logits_index_.end(), begin);
  for (auto i = first; i != logits_index_.end() && *i < end; ++i) {
    sample_tasks_.push_back({*i - begin, &input.tasks[i - logits_index_.begin()]});
  }
  sampler_->Enqueue(logits, sample_tasks_);
}

}  // namespace lockstep

#include "rollout/engine/engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep {

Engine::Engine(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, const EngineConfig& config)
    : spec_(spec),
      ops_(ops),
      config_(config),
      layout_(MakeStateLayout(spec, ops)),
      forward_(spec, weights, ops, layout_, config.max_rows),
      scratch_(ops.threads().threads()) {
  memory_ = {.weights = weights.bytes(),
             .activations = forward_.buffer_bytes(),
             .kv_page = KvBytesPerPage(spec, ops, config.page_size),
             .kv_pages = config.pages,
             .state_slot = layout_.bytes,
             .state_slots = config.slots};
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const ModelSpec& spec, const ModelWeights& weights, Ops& ops,
                                                       const EngineConfig& config) {
  LOCKSTEP_CHECK(config.slots >= 1 && config.max_rows >= 1 && config.page_size >= 16 && config.page_size % 16 == 0,
                 "slots {}, max_rows {}, page_size {}", config.slots, config.max_rows, config.page_size);
  std::unique_ptr<Engine> engine(new Engine(spec, weights, ops, config));
  LOCKSTEP_ASSIGN_OR_RETURN(engine->states_, Arena::Map(engine->layout_.bytes * config.slots));
  LOCKSTEP_ASSIGN_OR_RETURN(engine->kv_, Arena::Map(engine->memory_.kv_page * config.pages));
  std::byte* base = engine->kv_.data();
  for (const LayerSpec& layer : spec.layers) {
    KvLayer kv;
    if (layer.mixer != MixerKind::kGatedDeltaNet) {
      kv = {base, config.page_size};
      base += ops.KvPageBytes(layer.attention, config.page_size) * config.pages;
    }
    engine->kv_layers_.push_back(kv);
  }
  return engine;
}

void Engine::ResetSlot(int32_t index) {
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    if (layout_.offsets[i] >= 0) ops_.GdnResetState(spec_.layers[i].gdn, slot(index) + layout_.offsets[i]);
  }
}

void Engine::Copy(const StateCopy& copy) {
  if (layout_.bytes > 0) std::memcpy(slot(copy.to_slot), slot(copy.from_slot), layout_.bytes);
  if (copy.from_page < 0) return;
  for (size_t i = 0; i < spec_.layers.size(); ++i) {
    if (kv_layers_[i].base == nullptr) continue;
    const int64_t bytes = ops_.KvPageBytes(spec_.layers[i].attention, config_.page_size);
    std::memcpy(kv_layers_[i].base + copy.to_page * bytes, kv_layers_[i].base + copy.from_page * bytes, bytes);
  }
}

std::vector<absl::StatusOr<SampledToken>> Engine::Step(const StepInput& input) {
  for (int32_t s : input.reset_slots) ResetSlot(s);
  tokens_.clear();
  positions_.clear();
  pieces_.clear();
  std::vector<int64_t> first_row;
  for (const EnginePiece& piece : input.pieces) {
    const int64_t count = static_cast<int64_t>(piece.tokens.size());
    const int64_t begin = static_cast<int64_t>(tokens_.size());
    first_row.push_back(begin);
    pieces_.push_back(
        {begin, count, piece.position, layout_.bytes > 0 ? slot(piece.slot) : nullptr, piece.pages.data()});
    tokens_.insert(tokens_.end(), piece.tokens.begin(), piece.tokens.end());
    for (int64_t i = 0; i < count; ++i) positions_.push_back(piece.position + i);
  }
  forward_.Run({tokens_, positions_, pieces_}, kv_layers_);

  std::vector<absl::StatusOr<SampledToken>> results(input.tasks.size(), absl::UnknownError("not run"));
  RunTasks(input, first_row, results);
  for (const StateCopy& copy : input.copies) Copy(copy);
  return results;
}

// Logits for at most kLogitRows distinct rows at a time, so that prompt log-probabilities of a long piece need no
// [rows, vocab] buffer.
void Engine::RunTasks(const StepInput& input, std::span<const int64_t> first_row,
                      std::vector<absl::StatusOr<SampledToken>>& results) {
  const auto row_of = [&](size_t task) { return first_row[input.tasks[task].piece] + input.tasks[task].row; };
  std::vector<size_t> order(input.tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row_of(a) < row_of(b); });

  std::vector<int64_t> rows;        // of this block
  std::vector<int64_t> logits_row;  // by task of this block
  for (size_t begin = 0; begin < order.size();) {
    rows.clear();
    logits_row.clear();
    size_t end = begin;
    for (; end < order.size(); ++end) {
      const int64_t row = row_of(order[end]);
      if (rows.empty() || rows.back() != row) {
        if (static_cast<int64_t>(rows.size()) == ForwardPass::kLogitRows) break;
        rows.push_back(row);
      }
      logits_row.push_back(static_cast<int64_t>(rows.size()) - 1);
    }
    const Rows logits = forward_.Logits(rows);
    ops_.threads().ParallelFor(static_cast<int64_t>(end - begin), 1, [&](int64_t first, int64_t last, int thread) {
      for (int64_t i = first; i < last; ++i) {
        const RowTask& task = input.tasks[order[begin + i]];
        const std::span<const float> row(logits.row(logits_row[i]), logits.width);
        absl::StatusOr<SampledToken>& result = results[order[begin + i]];
        if (!task.forced) {
          result = SampleRow(row, *task.params, *task.options, *task.history, task.key, scratch_[thread]);
          continue;
        }
        absl::StatusOr<RowLogprobs> scored =
            ScoreRow(row, task.forced_token, *task.params, *task.options, *task.history, scratch_[thread]);
        result = scored.ok() ? absl::StatusOr<SampledToken>(SampledToken{task.forced_token, *std::move(scored)})
                             : scored.status();
      }
    });
    begin = end;
  }
}

}  // namespace lockstep

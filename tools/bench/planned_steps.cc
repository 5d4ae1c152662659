#include "tools/bench/planned_steps.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <span>
#include <utility>

#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep {

PlannedSteps::PlannedSteps(Engine& engine, int64_t vocab, int64_t max_tokens)
    : engine_(&engine), logprobs_{.temperature = true}, history_({}, /*needs_counts=*/false) {
  std::mt19937_64 rng(1);
  for (int64_t i = 0; i < std::max(max_tokens, engine.config().page_size); ++i)
    tokens_.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(vocab)));
}

absl::StatusOr<PlannedSteps> PlannedSteps::Create(Engine& engine, int64_t vocab, int64_t max_tokens) {
  LOCKSTEP_CHECK(engine.config().slots >= 2, "{} slots", engine.config().slots);
  PlannedSteps steps(engine, vocab, max_tokens);
  LOCKSTEP_RETURN_IF_ERROR(steps.Fill());
  return steps;
}

absl::Status PlannedSteps::Fill() {
  const EngineConfig& config = engine_->config();
  // Of one sequence's first page, and its state after it.
  std::vector<StateCopy> copies;
  for (int64_t i = 1; i < std::max(config.slots, config.pages); ++i) {
    const bool page = i < config.pages;
    copies.push_back({.from_slot = 0,
                      .to_slot = static_cast<int32_t>(1 + (i - 1) % (config.slots - 1)),
                      .from_page = page ? 0 : -1,
                      .to_page = page ? static_cast<int32_t>(i) : -1});
  }
  const int32_t first[] = {0};
  for (int64_t begin = 0; begin < config.page_size;) {
    const int64_t count = std::min(config.max_rows, config.page_size - begin);
    const bool last = begin + count == config.page_size;
    const EnginePiece piece{
        .position = begin,
        .tokens = std::span(tokens_).subspan(static_cast<size_t>(begin), static_cast<size_t>(count)),
        .slot = 0,
        .pages = std::span(first).first(config.pages > 0 ? 1 : 0)};
    LOCKSTEP_RETURN_IF_ERROR(engine_
                                 ->Step({.reset_slots = std::span(first).first(begin == 0 ? 1 : 0),
                                         .pieces = {&piece, 1},
                                         .copies = std::span(copies).first(last ? copies.size() : 0)})
                                 .status());
    begin += count;
  }
  return absl::OkStatus();
}

absl::StatusOr<double> PlannedSteps::Run(const StepPlan& plan, const Scheduler& scheduler) {
  LOCKSTEP_CHECK(plan.swapped_out.empty() && plan.swapped_in.empty(), "a kept sequence in a benchmark");
  const auto start = std::chrono::steady_clock::now();
  std::vector<EnginePiece> pieces;
  std::vector<RowTask> tasks;
  std::vector<StateCopy> copies;
  const auto sample = [&](size_t piece, int64_t count, SequenceId id) {
    tasks.push_back({.piece = static_cast<int64_t>(piece),
                     .row = count - 1,
                     .params = &sampling_,
                     .options = &logprobs_,
                     .history = &history_,
                     .key = {.seed = id}});
  };
  for (const PlannedPiece& piece : plan.pieces) {
    pieces.push_back(
        {.position = piece.position,
         .tokens = std::span(tokens_).subspan(static_cast<size_t>(piece.position), static_cast<size_t>(piece.count)),
         .slot = scheduler.slot(piece.id),
         .pages = scheduler.page_table(piece.id)});
    if (piece.last) sample(pieces.size() - 1, piece.count, piece.id);
    for (const Fork& fork : plan.forks) {
      if (fork.leader != piece.id) continue;
      sample(pieces.size() - 1, piece.count, fork.follower);
      copies.push_back({fork.from_slot, fork.to_slot, fork.from_page, fork.to_page});
    }
  }
  // A draw from logits that are not finite is an error of its task alone, and takes as long.
  LOCKSTEP_RETURN_IF_ERROR(
      engine_->Step({.reset_slots = plan.reset_slots, .pieces = pieces, .tasks = tasks, .copies = copies}).status());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace lockstep

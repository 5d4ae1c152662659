// The scheduler: which rows run in the next step. Pure: it sees sequence lengths, pages, slots and budgets; no tensors,
// no device, no threads, no clock. No result depends on its choices (docs/numerics.md), so it is free to mix, reorder,
// split, preempt and recompute.
//
// A sequence has `known` tokens (prompt and generated so far) and `computed` positions in its state. A step computes
// rows [computed, computed + count); the row of the last known token yields the next one. So a decoding sequence has
// known = computed + 1, and a new or preempted one has computed = 0.
//
// Use by one thread:  Add / Remove at step boundaries;  plan = Plan();  run it;  Apply(plan);  then AppendToken or
// Remove for each row that sampled.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "rollout/scheduler/page_pool.h"

namespace lockstep {

using SequenceId = uint64_t;

struct SchedulerConfig {
  int64_t page_size = 64;          // positions in a page
  int64_t pages = 0;               // 0: no layer has a KV cache, and pages are not counted
  int64_t slots = 0;               // sequences that can hold a state at once
  int64_t max_batch_tokens = 512;  // rows of a step: decode rows first, prefill pieces in what is left
  // Rows of a step while at least as many sequences decode as have a prompt to be computed: prompts then ride in decode
  // steps, which read all weights for few rows, instead of halting them. 0: max_batch_tokens always.
  int64_t mixed_batch_tokens = 0;
  // For tests of invariance: reorders, cuts pieces short, holds decode rows back and preempts at random. Results must
  // not change.
  std::optional<uint64_t> disturb_seed;
};

struct NewSequence {
  SequenceId id = 0;     // unique for the scheduler's life
  int64_t known = 0;     // tokens of the prompt (and generated prefix), at least 1
  int32_t priority = 0;  // larger runs first; among equals, earlier Add runs first
  bool samples = true;   // false: teacher-forced scoring, done when computed = known
  uint64_t group = 0;  // samples of one prompt (same `known`); 0: none. One of them prefills, the others fork from it.
};

struct PlannedPiece {
  SequenceId id = 0;
  int64_t position = 0;  // first row's
  int64_t count = 0;
  bool last = false;   // covers the last known token: its logits give the next one
  bool leads = false;  // the last of a group's prompt: the others fork from it
};

// After the rows have run, the follower's state becomes a copy of the leader's: slot to slot, and the page that both
// would write.
struct Fork {
  SequenceId leader = 0;
  SequenceId follower = 0;
  int32_t from_slot = 0;
  int32_t to_slot = 0;
  int32_t from_page = -1;  // -1: the prompt ends at a page boundary
  int32_t to_page = -1;
};

// The state of a kept sequence (Scheduler::Keep), moved out to host memory or back.
struct Swap {
  SequenceId id = 0;
  int32_t slot = 0;
  std::vector<int32_t> pages;  // those of the positions computed
};

struct StepPlan {
  std::vector<Swap> swapped_out;  // to be saved before anything else: their slots and pages may be others' already
  std::vector<Swap> swapped_in;   // to be restored before the rows run
  std::vector<PlannedPiece> pieces;
  std::vector<int32_t> reset_slots;  // to be cleared before the rows run: sequences that start at position 0
  std::vector<Fork>
      forks;  // to be copied after the rows have run; a follower samples its first token from its leader's row
  std::vector<SequenceId> preempted;  // lost their state and will be recomputed
  bool empty() const { return pieces.empty(); }
  // Keeps the memory.
  void Clear();
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);

  // Whether a sequence of this many tokens in all can ever run; INVALID_ARGUMENT says what it needs and what there is.
  absl::Status CheckFits(int64_t max_tokens) const;

  void Add(const NewSequence& sequence);
  void Remove(SequenceId id);
  // Valid until the next call.
  const StepPlan& Plan();
  // Advances what the plan computed, and forks.
  void Apply(const StepPlan& plan);
  // The sequence sampled a token: one more is known.
  void AppendToken(SequenceId id);

  // While held, no sequence starts that never ran.
  void HoldNew(bool hold) { hold_ = hold; }
  bool held() const { return hold_; }
  // Sequences that ran at least once and are not removed.
  int64_t started() const { return started_; }
  bool has_started(SequenceId id) const { return Get(id).started; }
  // The sequence's state is to be computed again from its first position.
  void Restart(SequenceId id);
  // The sequence's state cannot be computed again: from now on it is saved and restored where others are recomputed.
  // It has a whole state.
  void Keep(SequenceId id);
  // Whether all but the last known token are in its state, in its slot or swapped out.
  bool has_whole_state(SequenceId id) const;

  int32_t slot(SequenceId id) const;
  const std::vector<int32_t>& page_table(SequenceId id) const;
  int64_t computed(SequenceId id) const;
  bool admitted(SequenceId id) const;

  int64_t running() const { return static_cast<int64_t>(running_.size()); }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t pages_used() const { return pages_.used(); }
  int64_t slots_used() const { return config_.slots - static_cast<int64_t>(free_slots_.size()); }
  const SchedulerConfig& config() const { return config_; }

 private:
  struct Sequence {
    NewSequence spec;
    uint64_t arrival = 0;
    int64_t known = 0;
    int64_t computed = 0;
    bool started = false;
    bool kept = false;
    int64_t swapped = 0;  // positions of a kept sequence's state that are in host memory
    int32_t slot = -1;
    std::vector<int32_t> pages;
    bool prefills = false;  // counted in prefilling_
    bool decoding() const { return computed > 0 && known == computed + 1; }
    // Whether it could fork from, or be forked to, others of its group: it has generated nothing.
    bool shares_prompt() const { return spec.group != 0 && known == spec.known; }
  };
  // Higher priority first, then earlier arrival.
  struct RanksBefore {
    bool operator()(const Sequence* a, const Sequence* b) const {
      return a->spec.priority != b->spec.priority ? a->spec.priority > b->spec.priority : a->arrival < b->arrival;
    }
  };

  Sequence& Get(SequenceId id);
  const Sequence& Get(SequenceId id) const;
  int64_t PagesFor(int64_t tokens) const;
  bool Grow(Sequence& s, int64_t tokens, StepPlan& plan);
  void Release(Sequence& s);
  void Withdraw(Sequence& s);
  void CountPrefilling(Sequence& s);
  void Preempt(Sequence& s, StepPlan& plan);
  bool Admit(Sequence& s, StepPlan& plan);
  void Start(Sequence& s);
  bool WaitsForLeader(const Sequence& s) const;
  void PlanPiece(Sequence& s, int64_t* budget, StepPlan& plan);
  // Prompt rows for a step with `decoding` decode rows.
  int64_t PromptBudget(int64_t decoding) const;
  void PlanForks(StepPlan& plan);
  void Disturb(StepPlan& plan);
  bool Chance(int percent);

  SchedulerConfig config_;
  PagePool pages_;
  std::vector<int32_t> free_slots_;
  bool hold_ = false;
  int64_t started_ = 0;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  // Each sequence is in one of the two: with a slot, or without. In order of rank.
  std::vector<Sequence*> running_;
  std::set<Sequence*, RanksBefore> waiting_;
  absl::flat_hash_map<uint64_t, int64_t> prefilling_;  // by group: how many that run have a prompt to compute; not 0
  uint64_t arrivals_ = 0;
  StepPlan plan_;
  std::optional<std::mt19937_64> disturb_;
};

}  // namespace lockstep

#include "rollout/scheduler/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "rollout/base/check.h"

namespace lockstep {

Scheduler::Scheduler(const SchedulerConfig& config) : config_(config), pages_(config.pages) {
  LOCKSTEP_CHECK(config.slots >= 1 && config.page_size >= 1 && config.max_batch_tokens >= 1,
                 "slots {}, page_size {}, max_batch_tokens {}", config.slots, config.page_size,
                 config.max_batch_tokens);
  for (int64_t s = config.slots - 1; s >= 0; --s) free_slots_.push_back(static_cast<int32_t>(s));
  if (config.disturb_seed) disturb_.emplace(*config.disturb_seed);
}

int64_t Scheduler::PagesFor(int64_t tokens) const {
  return config_.pages == 0 ? 0 : (tokens + config_.page_size - 1) / config_.page_size;
}

absl::Status Scheduler::CheckFits(int64_t max_tokens) const {
  const int64_t pages = PagesFor(max_tokens);
  if (pages <= pages_.total()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("a sequence of up to ", max_tokens, " tokens needs ", pages,
                                                 " KV pages of ", config_.page_size, " tokens; this worker has ",
                                                 pages_.total(), " (", pages_.total() * config_.page_size, " tokens)"));
}

Scheduler::Sequence& Scheduler::Get(SequenceId id) {
  auto it = sequences_.find(id);
  LOCKSTEP_CHECK(it != sequences_.end(), "unknown sequence {}", id);
  return *it->second;
}
const Scheduler::Sequence& Scheduler::Get(SequenceId id) const {
  return const_cast<Scheduler*>(this)->Get(id);
}

void Scheduler::Add(const NewSequence& sequence) {
  LOCKSTEP_CHECK(sequence.known >= 1, "sequence {} has no token", sequence.id);
  auto s = std::make_unique<Sequence>();
  s->spec = sequence;
  s->arrival = arrivals_++;
  s->known = sequence.known;
  waiting_.insert(s.get());
  LOCKSTEP_CHECK(sequences_.emplace(sequence.id, std::move(s)).second, "sequence {} was added twice", sequence.id);
}

void Scheduler::Remove(SequenceId id) {
  Sequence& s = Get(id);
  if (s.slot >= 0) {
    Withdraw(s);
  } else {
    waiting_.erase(&s);
  }
  started_ -= s.started ? 1 : 0;
  sequences_.erase(id);
}

void Scheduler::Restart(SequenceId id) {
  Sequence& s = Get(id);
  s.kept = false;
  s.swapped = 0;
  if (s.slot < 0) return;
  Withdraw(s);
  waiting_.insert(&s);
}

bool Scheduler::has_whole_state(SequenceId id) const {
  const Sequence& s = Get(id);
  return std::max(s.computed, s.swapped) + 1 == s.known;
}

void Scheduler::Keep(SequenceId id) {
  LOCKSTEP_CHECK(has_whole_state(id), "sequence {} has no whole state to keep", id);
  Get(id).kept = true;
}

void Scheduler::Start(Sequence& s) {
  waiting_.erase(&s);
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &s, RanksBefore()), &s);
  s.slot = free_slots_.back();
  free_slots_.pop_back();
  started_ += s.started ? 0 : 1;
  s.started = true;
  CountPrefilling(s);
}

// To be called wherever `s` got or lost its slot, or was computed further.
void Scheduler::CountPrefilling(Sequence& s) {
  const bool prefills = s.spec.group != 0 && s.slot >= 0 && s.computed < s.spec.known;
  if (prefills == s.prefills) return;
  s.prefills = prefills;
  const auto count = prefilling_.try_emplace(s.spec.group, 0).first;
  count->second += prefills ? 1 : -1;
  if (count->second == 0) prefilling_.erase(count);
}

void Scheduler::AppendToken(SequenceId id) {
  Sequence& s = Get(id);
  LOCKSTEP_CHECK(s.known == s.computed, "sequence {} sampled with {} of {} tokens computed", id, s.computed, s.known);
  ++s.known;
}

int32_t Scheduler::slot(SequenceId id) const {
  return Get(id).slot;
}
const std::vector<int32_t>& Scheduler::page_table(SequenceId id) const {
  return Get(id).pages;
}
int64_t Scheduler::computed(SequenceId id) const {
  return Get(id).computed;
}
bool Scheduler::admitted(SequenceId id) const {
  return Get(id).slot >= 0;
}

void Scheduler::Release(Sequence& s) {
  for (int32_t page : s.pages) pages_.Drop(page);
  s.pages.clear();
  if (s.slot >= 0) free_slots_.push_back(s.slot);
  s.slot = -1;
  s.computed = 0;
  CountPrefilling(s);
}

// Takes all that a running sequence has.
void Scheduler::Withdraw(Sequence& s) {
  running_.erase(std::lower_bound(running_.begin(), running_.end(), &s, RanksBefore()));
  Release(s);
}

void Scheduler::Preempt(Sequence& s, StepPlan& plan) {
  if (s.kept) {
    s.swapped = s.computed;
    // One that was to come back in this very plan is still in host memory.
    if (std::erase_if(plan.swapped_in, [&](const Swap& swap) { return swap.id == s.spec.id; }) == 0) {
      Swap swap{s.spec.id, s.slot, s.pages};
      swap.pages.resize(PagesFor(s.computed));
      plan.swapped_out.push_back(std::move(swap));
    }
  }
  Withdraw(s);
  waiting_.insert(&s);
  plan.preempted.push_back(s.spec.id);
  std::erase_if(plan.pieces, [&](const PlannedPiece& p) { return p.id == s.spec.id; });
}

// Makes room for `tokens` positions, preempting sequences that rank behind `s`. False: there is no room and `s` itself
// ranks last.
bool Scheduler::Grow(Sequence& s, int64_t tokens, StepPlan& plan) {
  int64_t missing = PagesFor(tokens) - static_cast<int64_t>(s.pages.size());
  while (missing > pages_.free()) {
    Sequence& last = *running_.back();
    if (&last == &s) return false;
    Preempt(last, plan);
  }
  for (; missing > 0; --missing) s.pages.push_back(pages_.Take());
  return true;
}

// One sample of a group prefills the prompt; the rest wait for it and fork.
bool Scheduler::WaitsForLeader(const Sequence& s) const {
  return s.shares_prompt() && prefilling_.contains(s.spec.group);
}

// Gives a waiting sequence a slot and pages for all it has to compute, if they are free. One page for each running
// sequence is left over, so that a newcomer does not push out those that are about to grow.
bool Scheduler::Admit(Sequence& s, StepPlan& plan) {
  if (free_slots_.empty()) return false;
  const int64_t pages = PagesFor(s.known + (s.spec.samples ? 1 : 0));
  const int64_t spare = std::min<int64_t>(running(), pages_.total() - pages);
  if (config_.pages > 0 && pages + std::max<int64_t>(spare, 0) > pages_.free() &&
      !(running_.empty() && PagesFor(s.known) <= pages_.free()))
    return false;
  Start(s);
  if (s.swapped == 0) {
    plan.reset_slots.push_back(s.slot);
    return true;
  }
  s.computed = std::exchange(s.swapped, 0);
  CountPrefilling(s);
  for (int64_t p = PagesFor(s.computed); p > 0; --p) s.pages.push_back(pages_.Take());
  plan.swapped_in.push_back({s.spec.id, s.slot, s.pages});
  return true;
}

void Scheduler::PlanPiece(Sequence& s, int64_t* budget, StepPlan& plan) {
  int64_t count = std::min(s.known - s.computed, *budget);
  if (disturb_ && count > 1 && Chance(50)) count = 1 + static_cast<int64_t>((*disturb_)() % count);
  if (count <= 0) return;
  // A piece that is not the last ends with a page.
  if (count > config_.page_size && count < s.known - s.computed) count -= (s.computed + count) % config_.page_size;
  if (!Grow(s, s.computed + count, plan)) {
    // Nothing ranks behind it and memory is full: it gives up its own pages, so that those before it go on.
    Preempt(s, plan);
    return;
  }
  *budget -= count;
  const bool last = s.computed + count == s.known;
  plan.pieces.push_back({s.spec.id, s.computed, count, last, last && s.shares_prompt()});
}

int64_t Scheduler::PromptBudget(int64_t decoding) const {
  // Less would take too many steps.
  constexpr int64_t kLeast = 64;
  if (config_.mixed_batch_tokens == 0) return config_.max_batch_tokens;
  // Of those that wait, what could start now: one of a group computes the prompt for all, and memory bounds the rest.
  int64_t prompts = running() - decoding, slots = static_cast<int64_t>(free_slots_.size()), pages = pages_.free();
  uint64_t group = 0;
  for (auto r = waiting_.begin(); r != waiting_.end() && prompts <= decoding && slots > 0; ++r) {
    const Sequence& s = **r;
    if ((hold_ && !s.started) || (group != 0 && s.spec.group == group && s.shares_prompt())) continue;
    group = s.shares_prompt() ? s.spec.group : 0;
    if (WaitsForLeader(s)) continue;
    pages -= PagesFor(s.known);
    if (config_.pages > 0 && pages < running()) break;
    ++prompts;
    --slots;
  }
  if (decoding < prompts) return config_.max_batch_tokens;
  return std::max(config_.mixed_batch_tokens - decoding, kLeast);
}

void StepPlan::Clear() {
  swapped_out.clear();
  swapped_in.clear();
  pieces.clear();
  reset_slots.clear();
  forks.clear();
  preempted.clear();
}

const StepPlan& Scheduler::Plan() {
  StepPlan& plan = plan_;
  plan.Clear();
  if (disturb_) Disturb(plan);
  int64_t budget = config_.max_batch_tokens;
  // Decode rows first, then the rest of what already holds memory, then newcomers. Planning may preempt the sequence
  // itself and those behind it, never one before it.
  const auto round = [&](bool decoding) {
    for (size_t i = 0; i < running_.size(); ++i) {
      Sequence& s = *running_[i];
      if (s.decoding() != decoding || s.computed == s.known) continue;
      if (disturb_ && Chance(15)) continue;
      PlanPiece(s, &budget, plan);
    }
  };
  round(true);
  budget = std::min(budget, PromptBudget(static_cast<int64_t>(plan.pieces.size())));
  round(false);
  if (plan.preempted.empty() || running_.empty()) {
    // One that is admitted leaves waiting_.
    for (auto next = waiting_.begin(); next != waiting_.end() && budget > 0 && !free_slots_.empty();) {
      Sequence& s = **next++;
      if (WaitsForLeader(s) || (hold_ && !s.started)) continue;
      if (!Admit(s, plan)) break;
      PlanPiece(s, &budget, plan);
    }
  }
  PlanForks(plan);
  if (disturb_) std::shuffle(plan.pieces.begin(), plan.pieces.end(), *disturb_);
  // A slot given to a sequence that was preempted again in the same plan may stand twice, or be unused: clearing it is
  // harmless, and it is cleared before rows run.
  return plan;
}

void Scheduler::PlanForks(StepPlan& plan) {
  for (const PlannedPiece& piece : plan.pieces) {
    if (!piece.leads) continue;
    const Sequence& leader = Get(piece.id);
    const int64_t prompt = leader.spec.known;
    const bool partial_page = config_.pages > 0 && prompt % config_.page_size != 0;
    for (auto next = waiting_.begin(); next != waiting_.end();) {
      Sequence& s = **next++;
      if (s.spec.group != leader.spec.group || !s.shares_prompt()) continue;
      if (hold_ && !s.started) continue;
      if (disturb_ && Chance(20)) continue;
      if (free_slots_.empty() || pages_.free() < (partial_page ? 1 : 0) + (config_.pages > 0 ? running() : 0)) return;
      Start(s);
      Fork fork{leader.spec.id, s.spec.id, leader.slot, s.slot, -1, -1};
      s.pages = leader.pages;
      s.pages.resize(PagesFor(prompt));
      for (size_t i = 0; i + (partial_page ? 1 : 0) < s.pages.size(); ++i) pages_.AddReference(s.pages[i]);
      if (partial_page) {
        fork.from_page = s.pages.back();
        fork.to_page = s.pages.back() = pages_.Take();
      }
      plan.forks.push_back(fork);
    }
  }
}

void Scheduler::Apply(const StepPlan& plan) {
  for (const PlannedPiece& piece : plan.pieces) {
    Sequence& s = Get(piece.id);
    LOCKSTEP_CHECK(s.computed == piece.position, "sequence {} stands at {}, the plan at {}", piece.id, s.computed,
                   piece.position);
    s.computed += piece.count;
    CountPrefilling(s);
  }
  for (const Fork& fork : plan.forks) {
    Sequence& follower = Get(fork.follower);
    follower.computed = Get(fork.leader).spec.known;
    CountPrefilling(follower);
  }
}

bool Scheduler::Chance(int percent) {
  return static_cast<int>((*disturb_)() % 100) < percent;
}

void Scheduler::Disturb(StepPlan& plan) {
  for (Sequence* s : std::vector<Sequence*>(running_)) {
    if (Chance(1)) Preempt(*s, plan);
  }
}

}  // namespace lockstep

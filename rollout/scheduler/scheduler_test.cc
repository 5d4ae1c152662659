#include "rollout/scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace lockstep {
namespace {

// What a worker does around the scheduler: sequences that end after a given number of generated tokens, and the checks
// that must hold at every step.
class Simulation {
 public:
  explicit Simulation(const SchedulerConfig& config) : scheduler_(config), config_(config) {}

  void Add(SequenceId id, int64_t prompt, int64_t generate, int32_t priority = 0, uint64_t group = 0) {
    scheduler_.Add({.id = id, .known = prompt, .priority = priority, .samples = generate > 0, .group = group});
    sequences_[id] = {.prompt = prompt, .generate = generate, .group = group};
  }

  void Remove(SequenceId id) {
    scheduler_.Remove(id);
    sequences_.erase(id);
  }

  StepPlan Step() {
    StepPlan plan = scheduler_.Plan();
    for (SequenceId id : plan.preempted) {
      sequences_.at(id).computed = 0;
      ++preemptions;
    }
    int64_t rows = 0;
    std::set<int32_t> slots;
    std::map<int32_t, SequenceId> written;  // page -> who writes it in this step
    std::set<SequenceId> seen;
    for (const PlannedPiece& piece : plan.pieces) {
      State& s = sequences_.at(piece.id);
      EXPECT_TRUE(seen.insert(piece.id).second) << "a sequence stands twice in a plan";
      EXPECT_EQ(piece.position, s.computed);
      EXPECT_GE(piece.count, 1);
      EXPECT_LE(piece.position + piece.count, s.prompt + s.generated);
      EXPECT_EQ(piece.last, piece.position + piece.count == s.prompt + s.generated);
      EXPECT_TRUE(slots.insert(scheduler_.slot(piece.id)).second) << "two sequences share a slot";
      if (piece.position == 0) {
        EXPECT_TRUE(std::count(plan.reset_slots.begin(), plan.reset_slots.end(), scheduler_.slot(piece.id)) > 0)
            << "a slot was not cleared";
      }
      if (config_.pages > 0) {
        const std::vector<int32_t>& pages = scheduler_.page_table(piece.id);
        EXPECT_GE(static_cast<int64_t>(pages.size()) * config_.page_size, piece.position + piece.count);
        for (int64_t p = piece.position / config_.page_size;
             p <= (piece.position + piece.count - 1) / config_.page_size; ++p) {
          EXPECT_TRUE(written.emplace(pages[p], piece.id).second)
              << "page " << pages[p] << " is written by two sequences";
        }
      }
      rows += piece.count;
      s.computed += piece.count;
    }
    EXPECT_LE(rows, config_.max_batch_tokens);
    EXPECT_LE(scheduler_.slots_used(), config_.slots);
    EXPECT_LE(scheduler_.pages_used(), config_.pages);
    scheduler_.Apply(plan);
    for (const Fork& fork : plan.forks) {
      State& leader = sequences_.at(fork.leader);
      State& follower = sequences_.at(fork.follower);
      EXPECT_EQ(leader.group, follower.group);
      EXPECT_EQ(leader.computed, leader.prompt) << "a fork copies the state at the end of the prompt";
      EXPECT_EQ(fork.to_page >= 0, config_.pages > 0 && leader.prompt % config_.page_size != 0);
      follower.computed = leader.prompt;
      ++forks;
      Sampled(fork.follower);
    }
    for (const PlannedPiece& piece : plan.pieces) {
      if (piece.last) Sampled(piece.id);
    }
    return plan;
  }

  void RunToEnd(int64_t limit = 100000) {
    int64_t steps = 0;
    while (!sequences_.empty()) {
      ASSERT_LT(++steps, limit) << "no end in sight: " << sequences_.size() << " sequences left";
      Step();
    }
    EXPECT_EQ(scheduler_.pages_used(), 0) << "pages leaked";
    EXPECT_EQ(scheduler_.slots_used(), 0) << "slots leaked";
  }

  bool done(SequenceId id) const { return !sequences_.contains(id); }
  size_t left() const { return sequences_.size(); }
  Scheduler& scheduler() { return scheduler_; }
  int64_t preemptions = 0;
  int64_t forks = 0;

 private:
  struct State {
    int64_t prompt = 0, generate = 0, generated = 0, computed = 0;
    uint64_t group = 0;
  };

  void Sampled(SequenceId id) {
    State& s = sequences_.at(id);
    if (++s.generated >= s.generate) {
      Remove(id);
    } else {
      scheduler_.AppendToken(id);
    }
  }

  Scheduler scheduler_;
  SchedulerConfig config_;
  std::map<SequenceId, State> sequences_;
};

TEST(Scheduler, DecodeRowsComeBeforePrefill) {
  Simulation sim({.page_size = 16, .pages = 100, .slots = 4, .max_batch_tokens = 8});
  sim.Add(1, 4, 10);
  sim.Step();
  sim.Add(2, 100, 1);
  const StepPlan plan = sim.Step();
  ASSERT_EQ(plan.pieces.size(), 2u);
  EXPECT_EQ(plan.pieces[0].id, 1u);
  EXPECT_EQ(plan.pieces[0].count, 1);
  EXPECT_EQ(plan.pieces[1].count, 7);
}

TEST(Scheduler, PromptsRideInDecodeStepsOnceMostSequencesDecode) {
  Simulation sim({.page_size = 16, .pages = 1000, .slots = 8, .max_batch_tokens = 1024, .mixed_batch_tokens = 100});
  for (SequenceId id = 1; id <= 4; ++id) sim.Add(id, 150, 50);
  // None decodes yet: as much as fits.
  EXPECT_EQ(sim.Step().pieces.size(), 4u);
  sim.Add(5, 300, 5);
  // 4 decode, 1 waits: its pieces fill 100 rows, the last row but one of a page left to the next piece.
  StepPlan plan = sim.Step();
  ASSERT_EQ(plan.pieces.size(), 5u);
  EXPECT_EQ(plan.pieces[4].count, 96);
  for (SequenceId id = 6; id <= 8; ++id) sim.Add(id, 150, 5);
  // 4 decode, 4 have a prompt: as many, so they ride; then a fifth tips it.
  plan = sim.Step();
  EXPECT_EQ(plan.pieces.back().position, 96);
  EXPECT_EQ(plan.pieces.back().count, 96);
  sim.Remove(1);
  plan = sim.Step();
  int64_t rows = 0;
  for (const PlannedPiece& piece : plan.pieces) rows += piece.count;
  EXPECT_EQ(rows, 3 + (300 - 192) + 3 * 150);
}

TEST(Scheduler, PromptsThatCannotStartDoNotHaltDecoding) {
  const auto rows_beside = [](int64_t decoding, int64_t backlog, uint64_t group, int64_t pages) {
    Simulation sim(
        {.page_size = 64, .pages = pages, .slots = 256, .max_batch_tokens = 4096, .mixed_batch_tokens = 512});
    SequenceId id = 1;
    while (id <= static_cast<SequenceId>(decoding)) sim.Add(id++, 20, 100);
    for (int i = 0; i < 3; ++i) sim.Step();
    for (int64_t i = 0; i < backlog; ++i) sim.Add(id++, 1500, 5, 0, group);
    int64_t rows = 0;
    for (const PlannedPiece& piece : sim.Step().pieces) rows += piece.count;
    return rows;
  };
  EXPECT_LE(rows_beside(20, 1, 0, 4000), 512);
  EXPECT_LE(rows_beside(20, 64, 0, 70), 512) << "memory holds one of those that wait";
  EXPECT_LE(rows_beside(20, 64, /*group=*/1000, 4000), 512) << "one computes the prompt for all";
  EXPECT_GT(rows_beside(20, 64, 0, 4000), 512);
}

TEST(Scheduler, HigherPriorityRunsFirst) {
  Simulation sim({.page_size = 16, .pages = 100, .slots = 1, .max_batch_tokens = 8});
  sim.Add(1, 4, 1);
  sim.Add(2, 4, 1, /*priority=*/5);
  sim.Step();
  EXPECT_TRUE(sim.done(2));
  EXPECT_FALSE(sim.done(1));
}

TEST(Scheduler, MemoryPressurePreemptsTheLastAndAllFinish) {
  // 8 pages of 16; four sequences that each grow to 6 pages.
  Simulation sim({.page_size = 16, .pages = 8, .slots = 4, .max_batch_tokens = 64});
  for (SequenceId id = 1; id <= 4; ++id) sim.Add(id, 16, 80);
  sim.RunToEnd();
  EXPECT_GT(sim.preemptions, 0);
}

TEST(Scheduler, AGroupPrefillsOnceAndForks) {
  for (int64_t prompt : {1, 15, 16, 17, 100}) {
    Simulation sim({.page_size = 16, .pages = 1000, .slots = 8, .max_batch_tokens = 32});
    for (SequenceId id = 1; id <= 8; ++id) sim.Add(id, prompt, 5, 0, /*group=*/1);
    int64_t rows = 0;
    while (sim.left() == 8 && sim.forks == 0) {
      for (const PlannedPiece& piece : sim.Step().pieces) rows += piece.count;
    }
    EXPECT_EQ(rows, prompt) << "the prompt was computed more than once";
    EXPECT_EQ(sim.forks, 7);
    sim.RunToEnd();
  }
}

TEST(Scheduler, AGroupLargerThanTheSlotsStillFinishes) {
  Simulation sim({.page_size = 16, .pages = 40, .slots = 3, .max_batch_tokens = 32});
  for (SequenceId id = 1; id <= 10; ++id) sim.Add(id, 50, 20, 0, /*group=*/1);
  sim.RunToEnd();
  EXPECT_GE(sim.forks, 4);
}

TEST(Scheduler, RemovingALeaderLetsAnotherLead) {
  Simulation sim({.page_size = 16, .pages = 100, .slots = 8, .max_batch_tokens = 16});
  for (SequenceId id = 1; id <= 4; ++id) sim.Add(id, 64, 3, 0, /*group=*/1);
  sim.Step();
  sim.Remove(1);
  sim.RunToEnd();
  EXPECT_EQ(sim.forks, 2);
}

TEST(Scheduler, ModelsWithoutKvNeedNoPages) {
  Simulation sim({.page_size = 16, .pages = 0, .slots = 2, .max_batch_tokens = 16});
  for (SequenceId id = 1; id <= 6; ++id) sim.Add(id, 40, 5, 0, id <= 3 ? 1 : 0);
  sim.RunToEnd();
}

TEST(Scheduler, CheckFitsSaysWhatIsMissing) {
  const Scheduler scheduler({.page_size = 16, .pages = 4, .slots = 2, .max_batch_tokens = 16});
  EXPECT_TRUE(scheduler.CheckFits(64).ok());
  const absl::Status status = scheduler.CheckFits(65);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("needs 5 KV pages"), std::string::npos) << status;
}

TEST(Scheduler, RandomLoadsHoldEveryInvariantAndFinish) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    std::mt19937_64 rng(seed);
    const auto pick = [&](int64_t lo, int64_t hi) { return lo + static_cast<int64_t>(rng() % (hi - lo + 1)); };
    SchedulerConfig config{
        .page_size = 16 * pick(1, 4), .pages = 0, .slots = pick(1, 8), .max_batch_tokens = pick(1, 200)};
    if (seed % 3 == 0) config.mixed_batch_tokens = pick(1, 200);
    config.pages = seed % 5 == 0 ? 0 : 200 / config.page_size + pick(1, 20);  // one sequence has at most 180 tokens
    if (seed % 2) config.disturb_seed = seed;
    Simulation sim(config);
    SequenceId next = 1;
    for (int round = 0; round < 6; ++round) {
      const int64_t members = pick(1, 5), prompt = pick(1, 120);
      const uint64_t group = members > 1 ? next : 0;
      const int32_t priority = static_cast<int32_t>(pick(0, 2));
      const bool scoring = members == 1 && pick(0, 3) == 0;
      for (int64_t m = 0; m < members; ++m) sim.Add(next++, prompt, scoring ? 0 : pick(1, 60), priority, group);
      for (int64_t s = pick(0, 20); s > 0 && sim.left() > 0; --s) sim.Step();
      const SequenceId victim = static_cast<SequenceId>(pick(1, static_cast<int64_t>(next) - 1));
      if (!sim.done(victim)) sim.Remove(victim);
    }
    sim.RunToEnd();
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace lockstep

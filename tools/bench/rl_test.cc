// The RL shape: its schedule against a real run's, and what is integrated from some of its steps.
#include <algorithm>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/random_model.h"
#include "tools/bench/rl_run.h"
#include "tools/bench/rl_schedule.h"
#include "tools/bench/step_samples.h"

namespace lockstep {
namespace {

using ::testing::DoubleNear;
using ::testing::Each;

// 10 bytes a position, no weights: a step's bytes count its contexts.
Traffic PositionsOnly() {
  return {.windows = {{.keys = 0, .bytes = 10, .flops = 0, .layers = 1}}};
}

RlShape Shape(int64_t prompts, int64_t samples, int64_t prompt_tokens, int64_t length) {
  return {prompts, samples, prompt_tokens, std::vector<int64_t>(static_cast<size_t>(prompts * samples), length)};
}

TEST(RlSchedule, OnePromptIsPrefilledOnceAndForked) {
  const RlWalk walk =
      WalkSchedule(Shape(1, 4, 100, 3), {.pages = 64, .slots = 4, .max_batch_tokens = 256}, PositionsOnly());
  ASSERT_EQ(walk.steps.size(), 3u);
  EXPECT_EQ(walk.steps[0].prefill_rows, 100);
  EXPECT_EQ(walk.steps[0].decode_rows, 0);
  EXPECT_DOUBLE_EQ(walk.steps[0].bytes, 10 * 100);
  EXPECT_EQ(walk.steps[1].decode_rows, 4);
  // The prompt's one whole page once for all four.
  EXPECT_DOUBLE_EQ(walk.steps[1].bytes, 10 * (64 + 4 * (101 - 64)));
  EXPECT_DOUBLE_EQ(walk.steps[2].bytes, 10 * (64 + 4 * (102 - 64)));
  EXPECT_EQ(walk.peak_running, 4);
  EXPECT_EQ(walk.mixed_steps(), 1);
  EXPECT_EQ(walk.decode_rows(), 8);
  EXPECT_EQ(walk.preemptions, 0);
}

TEST(RlSchedule, AWindowReadsOnlyItsPartOfASharedPrompt) {
  Traffic traffic = PositionsOnly();
  traffic.windows = {{.keys = 50, .bytes = 10, .flops = 0, .layers = 1}};
  const RlWalk walk = WalkSchedule(Shape(1, 2, 128, 80), {.pages = 64, .slots = 4, .max_batch_tokens = 256}, traffic);
  // Positions 79 to 127 of the prompt once, and one of each sample's own.
  EXPECT_DOUBLE_EQ(walk.steps[1].bytes, 10 * (49 + 2 * 1));
  // Nothing of the prompt after 50 tokens.
  EXPECT_DOUBLE_EQ(walk.steps[60].bytes, 2 * 10 * 50);
}

TEST(RlSchedule, FullMemoryPreemptsAndRecomputes) {
  // Pages for about two full sequences, and admission that takes more.
  const RlWalk walk = WalkSchedule(Shape(6, 1, 16, 100),
                                   {.page_size = 16, .pages = 17, .slots = 6, .max_batch_tokens = 64}, PositionsOnly());
  EXPECT_GT(walk.preemptions, 0);
  EXPECT_GT(walk.prefill_rows(), 6 * 16);
  EXPECT_GT(walk.peak_running, 2);
}

TEST(RlLengths, AreTheLimitOrATailBelowIt) {
  EXPECT_THAT(DrawLengths(5, 1000, 0), Each(1000));
  std::vector<int64_t> drawn = DrawLengths(1001, 1000, 0.8);
  EXPECT_EQ(drawn, DrawLengths(1001, 1000, 0.8));
  std::sort(drawn.begin(), drawn.end());
  EXPECT_NEAR(static_cast<double>(drawn[500]), 500, 50);
  EXPECT_GE(drawn.front(), 1);
  // P(z > ln 2 / 0.8) = 0.193.
  EXPECT_NEAR(static_cast<double>(std::count(drawn.begin(), drawn.end(), 1000)), 193, 40);
}

// A run of 3,000 decode steps that grow, a prefill step before every 500th.
std::vector<StepLoad> LongRun() {
  std::vector<StepLoad> steps;
  for (int i = 0; i < 3000; ++i) {
    if (i % 500 == 0) steps.push_back({.bytes = 2e9, .prefill_rows = 1000 + i, .decode_rows = 3});
    steps.push_back({.bytes = 1e9 + 1e6 * i, .prefill_rows = 0, .decode_rows = 10});
  }
  return steps;
}

TEST(StepSamples, WindowsAreDisjointAndSpreadOverTheBytes) {
  const std::vector<StepLoad> steps = LongRun();
  const absl::StatusOr<SamplePlan> plan = PlanSamples(steps, 8, 64);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->windows.size(), 8u);
  for (size_t w = 0; w < plan->windows.size(); ++w) {
    EXPECT_EQ(plan->windows[w].end - plan->windows[w].begin, 64);
    EXPECT_GE(plan->windows[w].begin, w == 0 ? 0 : plan->windows[w - 1].end);
  }
  // Half of the bytes move in the last 0.39 of the steps' bytes 1 to 4 GB: the middle of the windows lies past the
  // run's.
  EXPECT_GT(plan->windows[4].begin, 1500);
  EXPECT_LE(plan->mixed.size(), 6u);
  EXPECT_GE(plan->mixed.size(), 4u);
  for (const int64_t step : plan->mixed) EXPECT_GT(steps[step].prefill_rows, 0);
  EXPECT_LE(plan->count(), 8 * 64 + 6);
}

TEST(StepSamples, MorePointsThanStepsMeasureEveryDecodeStepOnce) {
  std::vector<StepLoad> steps(10, StepLoad{.bytes = 5, .decode_rows = 1});
  const absl::StatusOr<SamplePlan> plan = PlanSamples(steps, 100, 64);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->windows.size(), 1u);
  EXPECT_EQ(plan->count(), 10);
}

TEST(StepSamples, ARunOfMixedStepsOnlyIsRefused) {
  const std::vector<StepLoad> steps(3, StepLoad{.bytes = 5, .prefill_rows = 7});
  EXPECT_EQ(PlanSamples(steps, 2, 64).status().code(), absl::StatusCode::kInvalidArgument);
}

// Times of a device that takes `ratio(i)` of the floor and so much a prefill row.
template <class Ratio>
std::pair<Integrated, double> Integrate(const std::vector<StepLoad>& steps, double row_seconds, const Ratio& ratio) {
  constexpr double kBandwidth = 4e12;
  std::vector<double> seconds;
  double total = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    seconds.push_back(steps[i].bytes / kBandwidth * ratio(i) +
                      static_cast<double>(steps[i].prefill_rows) * row_seconds);
    total += seconds.back();
  }
  const SamplePlan plan = *PlanSamples(steps, 8, 64);
  // What was not measured must not be read.
  for (size_t i = 0; i < seconds.size(); ++i) {
    if (!plan.chosen[i]) seconds[i] = std::numeric_limits<double>::quiet_NaN();
  }
  return {IntegrateSamples(steps, plan, seconds, kBandwidth), total};
}

TEST(StepSamples, AConstantRatioAndPriceAreFoundExactly) {
  const auto [found, total] = Integrate(LongRun(), 2e-5, [](size_t) { return 1.25; });
  EXPECT_NEAR(found.seconds, total, 1e-9 * total);
  EXPECT_THAT(found.ratios, Each(DoubleNear(1.25, 1e-9)));
  EXPECT_NEAR(found.prefill_row_seconds, 2e-5, 1e-12);
}

TEST(StepSamples, ARatioThatFallsIsInterpolated) {
  const auto [found, total] =
      Integrate(LongRun(), 2e-5, [](size_t i) { return 1.1 + 300.0 / (1000.0 + static_cast<double>(i)); });
  EXPECT_NEAR(found.seconds, total, 0.01 * total);
}

RlOptions SmallRun() {
  return {.shape = {.prompts = 3, .samples = 4, .prompt_tokens = 20, .lengths = DrawLengths(12, 40, 0.7)},
          .loop = {.page_size = 16, .max_batch_tokens = 32, .max_sequences = 6, .max_kv_tokens = 16 * 16}};
}

class RlRunTest : public ::testing::TestWithParam<ModelKind> {};

// RunRl compares the loop's steps and tokens with the schedule's.
TEST_P(RlRunTest, AWholeRunTakesTheStepsThatWereWalked) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(GetParam(), "fp32", 1, 1);
  const absl::StatusOr<RlResult> run = RunRl(*model, SmallRun(), 1e10);
  ASSERT_TRUE(run.ok()) << run.status();
  EXPECT_GT(run->seconds, 0);
  EXPECT_EQ(run->measured_steps, static_cast<int64_t>(run->walk.steps.size()));
  EXPECT_DOUBLE_EQ(run->floor_seconds, run->walk.bytes() / 1e10);
}

INSTANTIATE_TEST_SUITE_P(Models, RlRunTest, ::testing::ValuesIn(AllModelKinds()));

TEST(RlRun, ASampledRunMeasuresSomeOfTheSameSteps) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kDenseSliding, "fp32", 1, 1);
  RlOptions options = SmallRun();
  options.shape.lengths = DrawLengths(12, 400, 0.7);
  options.loop.max_kv_tokens = 16 * 60;
  const absl::StatusOr<RlResult> whole = RunRl(*model, options, 1e10);
  ASSERT_TRUE(whole.ok()) << whole.status();
  options.sample_steps = 3;
  const absl::StatusOr<RlResult> sampled = RunRl(*model, options, 1e10);
  ASSERT_TRUE(sampled.ok()) << sampled.status();
  EXPECT_EQ(sampled->walk.steps.size(), whole->walk.steps.size());
  EXPECT_DOUBLE_EQ(sampled->floor_seconds, whole->floor_seconds);
  EXPECT_LT(sampled->measured_steps, whole->measured_steps);
  EXPECT_LE(sampled->measured_steps, 3 * 64 + 3);
  EXPECT_LE(sampled->ratio_min, sampled->ratio_max);
  // Of one machine's moods, wide; an integral over the wrong steps would be off by the share measured.
  EXPECT_GT(sampled->seconds, whole->seconds / 4);
  EXPECT_LT(sampled->seconds, whole->seconds * 4);
}

TEST(RlRun, MemoryForOneSequenceIsNotSampled) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kDenseSliding, "fp32", 1, 1);
  RlOptions options = SmallRun();
  options.loop.max_sequences = 1;
  options.sample_steps = 3;
  EXPECT_EQ(RunRl(*model, options, 1e10).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace lockstep

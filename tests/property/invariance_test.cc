// docs/numerics.md, "What must always hold", 1 and 2: for random models, requests and schedules, Generate's tokens and
// log-probabilities do not depend on the batch, the prefill budget, page size, thread count, preemption, forks or
// order; and Score gives the same bits for the same tokens.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "tests/property/schedules.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

TEST(Invariance, GenerateEqualsItselfAndScoreUnderRandomSchedules) {
  Tally tally;
  uint64_t seed = 1;
  // 8 profiles x 4 models x 2 sets of requests x 6 schedules = 384 schedules.
  for (const NumericsProfile& profile : NumericsProfiles()) {
    for (ModelKind kind : AllModelKinds()) {
      for (int set = 0; set < 2; ++set, ++seed) {
        SCOPED_TRACE(testing::Message() << ModelKindName(kind) << ", " << profile.name << ", seed " << seed);
        const std::string numerics(profile.name);
        const auto model = MakeRandomModel(kind, numerics, seed, 1);
        const auto threaded = MakeRandomModel(kind, numerics, seed, 3);
        CheckInvariance(*model, *threaded, seed, 6, tally);
        if (HasFatalFailure()) return;
      }
    }
  }
  std::printf(
      "%ld schedules, %ld generated tokens compared, %ld scored; %ld preemptions, %ld forked samples; 0 differing "
      "bits\n",
      static_cast<long>(tally.schedules), static_cast<long>(tally.tokens), static_cast<long>(tally.scored),
      static_cast<long>(tally.preemptions), static_cast<long>(tally.forked));
  EXPECT_GE(tally.schedules, 200);
  EXPECT_GT(tally.preemptions, 100) << "the schedules did not preempt: the test lost its point";
  EXPECT_GT(tally.forked, 100) << "no sample was forked: the test lost its point";
}

// The test can fail: one flipped weight bit changes results.
TEST(Invariance, AnotherModelGivesOtherBits) {
  const auto a = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  const auto b = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  std::unique_ptr<VectorWeight>& a_log = b->weights.layers[0].gdn.a_log;
  std::vector<float> nudged(a_log->floats(), a_log->floats() + a_log->size());
  nudged[0] = std::nextafter(nudged[0], 10.0f);
  a_log = *b->ops().PackVector(nudged, /*exact=*/true);
  const std::vector<RequestSpec> requests = RandomRequests(a->spec, 7);
  const RequestSpec score = ScoreOf(requests[0], {.tokens = std::vector<int32_t>(64, 5)});
  const LoopConfig config{.max_kv_tokens = 4096};
  auto loop_a = MakeLocalLoop(*a, config), loop_b = MakeLocalLoop(*b, config);
  const auto x = RunAll(*loop_a->loop, {score})[0], y = RunAll(*loop_b->loop, {score})[0];
  int64_t differing = 0;
  for (size_t i = 0; i < x->prompt_logprobs().size(); ++i)
    differing += !SameScores(x->prompt_logprobs()[i], y->prompt_logprobs()[i]);
  EXPECT_GT(differing, 0);
}

}  // namespace
}  // namespace lockstep

#include "tools/bench/point.h"

#include <gtest/gtest.h>

#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

TEST(Point, SamplesOfAPromptShareItsWholePagesInTheFloor) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  const Traffic traffic = TrafficOf(model->spec, model->weights, model->ops());
  const auto floor_bytes = [&](const PointShape& shape) {
    const absl::StatusOr<PointTimes> times = TimePoint(*model, shape, /*bandwidth=*/1e3);
    EXPECT_TRUE(times.ok()) << times.status();
    return times.ok() ? times->floor_ms : 0;
  };
  PointShape shape = {.batch = 4, .context = 70, .steps = 3, .max_batch_tokens = 32};
  EXPECT_DOUBLE_EQ(floor_bytes(shape), traffic.DecodeStepBytes(4, 70));
  // Two prompts: two of the four sequences read the 64 positions of a page that the others read.
  shape.samples = 2;
  EXPECT_DOUBLE_EQ(floor_bytes(shape), traffic.DecodeStepBytes(4, 70) - 2 * traffic.KvBytes(64));
}

// A window of 37 sees 6 positions of its own, so 31 of the page.
TEST(Point, AWindowSeesLessOfThePagesThatSamplesShare) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kDenseSliding, "fp32", 1, 1);
  const Traffic traffic = TrafficOf(model->spec, model->weights, model->ops());
  ASSERT_EQ(traffic.windows.size(), 2u);
  double shared = 0;
  for (const Traffic::Window& w : traffic.windows) shared += w.bytes * (w.keys == 37 ? 31 : 64);
  const PointShape shape = {.batch = 4, .context = 70, .samples = 2, .steps = 3, .max_batch_tokens = 32};
  const absl::StatusOr<PointTimes> times = TimePoint(*model, shape, /*bandwidth=*/1e3);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_DOUBLE_EQ(times->floor_ms, traffic.DecodeStepBytes(4, 70) - 2 * shared);
}

}  // namespace
}  // namespace lockstep

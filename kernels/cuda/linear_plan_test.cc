#include "kernels/cuda/linear_plan.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace lockstep::cuda {
namespace {

constexpr int kMultiprocessors = 132;
constexpr int64_t kSharedLimit = 232448;  // of a block on Hopper
constexpr int64_t kRowBytes = 128;        // of a box

void ExpectSound(const LinearShape& shape, const LinearTile& tile, int multiprocessors) {
  SCOPED_TRACE(::testing::Message() << shape.m << " x " << shape.n << " x " << shape.k << ", tile " << tile.warpgroups
                                    << " x " << tile.blocks << " x " << tile.features
                                    << (shape.fusion == LinearFusion::kSwiGlu ? ", SwiGLU" : ""));
  const absl::StatusOr<LinearPlan> plan = PlanLinear(shape, tile, multiprocessors);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  ASSERT_EQ(plan->tile, tile);
  // The tiles reach every output, and no row or column of tiles is idle.
  ASSERT_GE(plan->token_tiles * tile.tokens(), shape.m);
  ASSERT_LT((plan->token_tiles - 1) * tile.tokens(), shape.m);
  ASSERT_GE(plan->feature_tiles * tile.outputs(shape.fusion), shape.n);
  ASSERT_LT((plan->feature_tiles - 1) * tile.outputs(shape.fusion), shape.n);
  ASSERT_EQ(tile.outputs(shape.fusion) % 8, 0);
  ASSERT_EQ(plan->thread_blocks, std::min<int64_t>(plan->token_tiles * plan->feature_tiles, multiprocessors));
  ASSERT_GE(plan->group_tokens, 1);
  ASSERT_LE(plan->group_tokens, plan->token_tiles);
  // What is copied covers the tile's tokens, in whole groups of the swizzle's 8 rows; a box has 256 rows at most.
  ASSERT_EQ(plan->x_rows % 8, 0);
  ASSERT_GE(plan->x_rows, std::min<int64_t>(shape.m, tile.tokens()));
  ASSERT_LE(plan->x_rows, tile.tokens());
  ASSERT_LE(std::max(plan->x_rows, tile.features), 256);
  // The ring has room, and so has what the last products read beyond it.
  const int boxes = LinearStageBoxes(tile.tokens(), tile.features);
  ASSERT_EQ(plan->stage_bytes, boxes * (plan->x_rows + tile.features) * kRowBytes);
  ASSERT_GE(plan->stages, 2);
  ASSERT_LE(plan->stages, kLinearMaxStages);
  const int64_t ring = 1024 + plan->stages * plan->stage_bytes;
  const int64_t last_box = ring - plan->stage_bytes + (boxes - 1) * plan->x_rows * kRowBytes;
  ASSERT_LE(std::max(ring, last_box + tile.tokens() * kRowBytes), plan->shared_bytes);
  ASSERT_LE(plan->shared_bytes + 2 * kLinearMaxStages * 8, kSharedLimit);
}

TEST(CudaLinearPlan, ChosenTilesAreSound) {
  for (const int multiprocessors : {1, 8, 114, 132}) {
    for (const int64_t m :
         {1, 2, 8, 9, 31, 64, 65, 100, 128, 129, 200, 256, 257, 512, 777, 2048, 8192, 16384, 100000}) {
      for (const int64_t n : {8, 64, 264, 512, 3840, 4096, 11008, 11520, 12288, 17280, 22016, 100280, 100352}) {
        for (const int64_t k : {16, 48, 256, 768, 3840, 4096, 5760, 11008}) {
          for (const LinearFusion fusion : {LinearFusion::kNone, LinearFusion::kSwiGlu}) {
            const LinearShape shape = {.m = m, .n = n, .k = k, .fusion = fusion};
            ExpectSound(shape, ChooseLinearTile(shape, multiprocessors), multiprocessors);
          }
        }
      }
    }
  }
}

template <int... kWidths>
void ExpectAllSound(std::integer_sequence<int, kWidths...>, int warpgroups, int blocks,
                    LinearFusion fusion = LinearFusion::kNone) {
  for (const int features : {kWidths...}) {
    for (const int64_t m : {1, 40, 300}) {
      const LinearTile tile = {.warpgroups = warpgroups, .blocks = blocks, .features = features};
      ExpectSound({.m = m, .n = 3840, .k = 3840, .fusion = fusion}, tile, kMultiprocessors);
    }
  }
}

TEST(CudaLinearPlan, CompiledTilesAreSound) {
  ExpectAllSound(LinearWidths1x1(), 1, 1);
  ExpectAllSound(LinearWidths2x1(), 2, 1);
  ExpectAllSound(LinearWidths2x2(), 2, 2);
  ExpectAllSound(LinearSwiGluWidths1x1(), 1, 1, LinearFusion::kSwiGlu);
  ExpectAllSound(LinearSwiGluWidths2x1(), 2, 1, LinearFusion::kSwiGlu);
  ExpectAllSound(LinearSwiGluWidths2x2(), 2, 2, LinearFusion::kSwiGlu);
}

// A decode step waits for memory: nearly every multiprocessor must pull weights, and all as many.
TEST(CudaLinearPlan, DecodeKeepsTheDeviceBusy) {
  for (const int64_t m : {1, 16, 32, 64}) {
    for (const int64_t n : {3840, 4096, 11520, 12288, 17280, 22016, 100352}) {
      SCOPED_TRACE(::testing::Message() << m << " x " << n);
      const LinearShape shape = {.m = m, .n = n, .k = 3840};
      const absl::StatusOr<LinearPlan> plan =
          PlanLinear(shape, ChooseLinearTile(shape, kMultiprocessors), kMultiprocessors);
      ASSERT_TRUE(plan.ok());
      const int64_t tiles = plan->token_tiles * plan->feature_tiles;
      EXPECT_EQ(plan->token_tiles, 1);
      EXPECT_GE(plan->thread_blocks, 120);
      const int64_t rounds = (tiles + plan->thread_blocks - 1) / plan->thread_blocks;
      EXPECT_LE(rounds * plan->thread_blocks * plan->tile.features, n * 21 / 20);
    }
  }
}

// Tiles within 6% of the fastest that an H200 ran of all that were tried.
TEST(CudaLinearPlan, ChoosesWhatWasFast) {
  const auto choice = [](int64_t m, int64_t n, int64_t k) {
    return ChooseLinearTile({.m = m, .n = n, .k = k}, kMultiprocessors);
  };
  EXPECT_EQ(choice(1, 3840, 11008), (LinearTile{.features = 32}));
  EXPECT_EQ(choice(64, 17344, 3840), (LinearTile{.features = 136}));
  EXPECT_EQ(choice(128, 3840, 11008), (LinearTile{.features = 64}));
  EXPECT_EQ(choice(256, 3840, 5760), (LinearTile{.features = 120}));
  EXPECT_EQ(choice(2048, 22016, 3840), (LinearTile{.warpgroups = 2, .blocks = 2, .features = 192}));
  EXPECT_EQ(choice(2048, 3840, 11008), (LinearTile{.warpgroups = 2, .features = 240}));
}

// Gate and up of 11,008 features: 126 tiles of 88 each, one a multiprocessor.
TEST(CudaLinearPlan, SwiGluKeepsTheDeviceBusy) {
  const auto choice = [](int64_t m) {
    return ChooseLinearTile({.m = m, .n = 11008, .k = 3840, .fusion = LinearFusion::kSwiGlu}, kMultiprocessors);
  };
  for (const int64_t m : {1, 16, 32, 64}) EXPECT_EQ(choice(m), (LinearTile{.features = 176})) << m;
  for (const int64_t m : {65, 100, 128}) {
    EXPECT_EQ(choice(m), (LinearTile{.warpgroups = 2, .features = 176})) << m;
  }
  EXPECT_EQ(choice(2048), (LinearTile{.warpgroups = 2, .blocks = 2, .features = 192}));
}

TEST(CudaLinearPlan, RefusesWhatIsNotCompiled) {
  const LinearShape shape = {.m = 64, .n = 3840, .k = 3840};
  const auto refused = [&](const LinearTile& tile) {
    return PlanLinear(shape, tile, kMultiprocessors).status().code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused({.warpgroups = 3, .blocks = 1, .features = 64}));
  EXPECT_TRUE(refused({.warpgroups = 1, .blocks = 2, .features = 64}));
  EXPECT_TRUE(refused({.warpgroups = 1, .blocks = 1, .features = 60}));
  EXPECT_FALSE(refused({.warpgroups = 1, .blocks = 1, .features = 64}));
  const LinearShape swiglu = {.m = 64, .n = 3840, .k = 3840, .fusion = LinearFusion::kSwiGlu};
  EXPECT_EQ(PlanLinear(swiglu, {.features = 168}, kMultiprocessors).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(PlanLinear(swiglu, {.features = 176}, kMultiprocessors).ok());
}

}  // namespace
}  // namespace lockstep::cuda

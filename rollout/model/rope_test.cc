#include "rollout/model/rope.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "rollout/model/spec.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Distance in representable values. Both are positive.
int64_t Ulps(float a, float b) {
  return std::abs(static_cast<int64_t>(std::bit_cast<int32_t>(a)) - std::bit_cast<int32_t>(b));
}

// tools/make_rope_fixture.py: what transformers makes of the same configs.
TEST(Rope, FrequenciesAreTransformers) {
  std::ifstream file(LOCKSTEP_TEST_DATA "/model/rope.json");
  const json fixture = json::parse(file);
  ASSERT_GE(fixture["cases"].size(), 20);
  int64_t worst = 0;
  int64_t compared = 0;
  for (const json& entry : fixture["cases"]) {
    SCOPED_TRACE(entry["name"].get<std::string>());
    const auto spec = ParseModelSpec(entry["config"].dump(), "");
    ASSERT_TRUE(spec.ok()) << spec.status();
    ASSERT_EQ(spec->layers.size(), entry["layers"].size());
    for (size_t i = 0; i < spec->layers.size(); ++i) {
      const json& wanted = entry["sets"][entry["layers"][i].get<size_t>()];
      const std::optional<RopeSpec>& rope = spec->layers[i].rope;
      ASSERT_EQ(rope.has_value(), !wanted.is_null()) << "layer " << i;
      if (wanted.is_null()) continue;
      EXPECT_EQ(rope->attention_scaling, wanted["attention_scaling"].get<float>());
      ASSERT_EQ(rope->inv_freq.size(), wanted["inv_freq"].size());
      for (size_t k = 0; k < rope->inv_freq.size(); ++k) {
        const int64_t ulps = Ulps(rope->inv_freq[k], wanted["inv_freq"][k].get<float>());
        EXPECT_LE(ulps, 1) << "layer " << i << ", frequency " << k;
        worst = std::max(worst, ulps);
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 500);
  RecordProperty("compared", static_cast<int>(compared));
  RecordProperty("worst_ulps", static_cast<int>(worst));
}

TEST(Rope, DefaultIsPowersOfTheta) {
  const RopeSpec rope = ComputeRope({.theta = 16}, 8);
  EXPECT_EQ(rope.inv_freq, (std::vector<float>{1.0f, 0.5f, 0.25f, 0.125f}));
  EXPECT_EQ(rope.attention_scaling, 1.0f);
}

TEST(Rope, LinearDividesByTheFactor) {
  const RopeSpec rope = ComputeRope({.type = RopeType::kLinear, .theta = 16, .factor = 4}, 8);
  EXPECT_EQ(rope.inv_freq, (std::vector<float>{0.25f, 0.125f, 0.0625f, 0.03125f}));
}

TEST(Rope, YarnKeepsFastDimensionsAndDividesSlowOnes) {
  const RopeParameters yarn{.type = RopeType::kYarn, .theta = 500000, .factor = 8, .original_max_position = 8192};
  const RopeSpec scaled = ComputeRope(yarn, 128);
  const RopeSpec plain = ComputeRope({.theta = 500000}, 128);
  EXPECT_EQ(scaled.inv_freq.front(), plain.inv_freq.front());
  EXPECT_EQ(scaled.inv_freq.back(), plain.inv_freq.back() / 8);
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_LE(scaled.inv_freq[i], plain.inv_freq[i]);
    EXPECT_GE(scaled.inv_freq[i], plain.inv_freq[i] / 8 * 0.999999f);
  }
  EXPECT_FLOAT_EQ(scaled.attention_scaling, 0.1f * std::log(8.0f) + 1.0f);
}

}  // namespace
}  // namespace lockstep

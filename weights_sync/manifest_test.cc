#include "weights_sync/manifest.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"

namespace lockstep {
namespace {

std::vector<TensorSlot> Slots() {
  return {{.name = "embed", .shape = {8, 4}, .held = DType::kBF16},
          {.name = "norm", .shape = {4}, .held = DType::kBF16, .aliases = {"old_norm"}},
          {.name = "conv",
           .shape = {12, 1, 4},
           .parts = {"conv_q", "conv_k", "conv_v"},
           .part_rows = {{2, 2, 8}, {4, 4, 4}}},
          {.name = "head", .shape = {8, 4}, .held = DType::kBF16, .tied_to = 0}};
}

Manifest Whole() {
  return {.tensors = {{"embed", DType::kF32, {8, 4}}, {"norm", DType::kBF16, {4}}, {"conv", DType::kBF16, {12, 1, 4}}}};
}

void ExpectProblem(const Manifest& manifest, std::string_view text) {
  const auto placed = PlaceTensors(manifest, Slots());
  ASSERT_FALSE(placed.ok()) << text;
  EXPECT_TRUE(absl::IsInvalidArgument(placed.status()));
  EXPECT_TRUE(absl::StrContains(placed.status().message(), std::string(text))) << placed.status();
}

TEST(ManifestTest, PlacesWholeTensorsAliasesAndParts) {
  auto placed = PlaceTensors(Whole(), Slots());
  ASSERT_TRUE(placed.ok()) << placed.status();
  EXPECT_EQ((*placed)[0].bytes, 8 * 4 * 4);
  EXPECT_EQ((*placed)[2].slot, 2u);
  EXPECT_EQ((*placed)[2].rows, 12);

  Manifest parts = {.tensors = {{"conv_v", DType::kBF16, {8, 1, 4}},
                                {"conv_q", DType::kBF16, {2, 1, 4}},
                                {"head", DType::kF32, {8, 4}},
                                {"old_norm", DType::kF32, {4}},
                                {"embed", DType::kF32, {8, 4}},
                                {"conv_k", DType::kBF16, {2, 1, 4}}}};
  placed = PlaceTensors(parts, Slots());
  ASSERT_TRUE(placed.ok()) << placed.status();
  EXPECT_EQ((*placed)[0].first_row, 4);
  EXPECT_EQ((*placed)[1].first_row, 0);
  EXPECT_EQ((*placed)[2].slot, 3u);
  EXPECT_EQ((*placed)[5].first_row, 2);
  // transformers' cut in thirds.
  for (const size_t i : {0, 1, 5}) parts.tensors[i].shape[0] = 4;
  placed = PlaceTensors(parts, Slots());
  ASSERT_TRUE(placed.ok()) << placed.status();
  EXPECT_EQ((*placed)[0].first_row, 8);
}

TEST(ManifestTest, ASubsetNeedsABaseVersion) {
  Manifest subset = {.tensors = {{"norm", DType::kBF16, {4}}}};
  ExpectProblem(subset, "2 differences from the model's tensors: missing embed; missing conv");
  subset.base_version = WeightVersion{0, 3};
  EXPECT_TRUE(PlaceTensors(subset, Slots()).ok());
}

TEST(ManifestTest, ATiedTensorComesWithWhatItIsTiedTo) {
  Manifest subset = {.tensors = {{"head", DType::kBF16, {8, 4}}}, .base_version = WeightVersion{0, 3}};
  ExpectProblem(subset, "1 differences from the model's tensors: head is tied to embed; want that one, or both");
  subset.tensors.push_back({"embed", DType::kBF16, {8, 4}});
  EXPECT_TRUE(PlaceTensors(subset, Slots()).ok());
  subset.tensors.erase(subset.tensors.begin());
  EXPECT_TRUE(PlaceTensors(subset, Slots()).ok());
}

// They are compared as sent: two roundings of the same values have two digests.
TEST(ManifestTest, ATiedTensorComesInTheDTypeOfWhatItIsTiedTo) {
  Manifest m = Whole();
  m.tensors.push_back({"head", DType::kBF16, {8, 4}});
  ExpectProblem(m, "1 differences from the model's tensors: head is bfloat16 and embed, to which it is tied, float32");
  m.tensors[0].dtype = DType::kBF16;
  EXPECT_TRUE(PlaceTensors(m, Slots()).ok());
}

TEST(ManifestTest, SlotsHaveTheirNamesAndAliases) {
  const std::vector<TensorSlot> slots = Slots();
  EXPECT_EQ(SlotNamed(slots, "norm"), 1u);
  EXPECT_EQ(SlotNamed(slots, "old_norm"), 1u);
  EXPECT_EQ(SlotNamed(slots, "conv_q"), std::nullopt) << "a part of one";
}

TEST(ManifestTest, SaysWhatIsWrong) {
  Manifest m = Whole();
  m.tensors[1].shape = {5};
  ExpectProblem(m, "norm is [5], want [4]");
  m = Whole();
  m.tensors.push_back({"old_norm", DType::kF32, {4}});
  ExpectProblem(m, "norm is given more than once: norm, old_norm");
  m = Whole();
  m.tensors.push_back({"conv_q", DType::kF32, {2, 1, 4}});
  ExpectProblem(m, "conv is given more than once");
  m.tensors.erase(m.tensors.begin() + 2);
  ExpectProblem(m, "conv in parts needs each of conv_q, conv_k, conv_v once");
  m = Whole();
  m.tensors.push_back({"extra", DType::kF32, {2}});
  ExpectProblem(m, "unknown tensor extra");
  m = {};
  for (int i = 0; i < 20; ++i) m.tensors.push_back({"extra" + std::to_string(i), DType::kF32, {2}});
  ExpectProblem(m, "23 differences");
  ExpectProblem(m, "; and 13 more");
  ExpectProblem(m, "unknown tensor extra9;");
}

}  // namespace
}  // namespace lockstep

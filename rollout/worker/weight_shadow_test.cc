// What a shadow brings back, and that it notices when it did not.
#include "rollout/worker/weight_shadow.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "absl/strings/match.h"
#include "kernels/digest_math.h"

namespace lockstep {
namespace {

class FakeLive final : public LiveWeights {
 public:
  int64_t bytes() const override { return static_cast<int64_t>(memory.size()); }
  absl::Status Write(int64_t offset, std::span<const std::byte> data) override {
    if (writes) std::memcpy(memory.data() + offset, data.data(), data.size());
    return absl::OkStatus();
  }
  absl::Status Finish() override { return absl::OkStatus(); }
  std::byte* Address(int64_t, int64_t) override { return nullptr; }
  absl::Status Read(int64_t offset, std::span<std::byte> to) override {
    std::memcpy(to.data(), memory.data() + offset, to.size());
    return absl::OkStatus();
  }
  absl::StatusOr<uint64_t> SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) override {
    return DigestSum(std::span(memory).subspan(offset, bytes), first_word);
  }

  std::vector<std::byte> memory = std::vector<std::byte>(1024, std::byte{1});
  bool writes = true;
};

class WeightShadowTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto made = WeightShadow::Create(
        &live_, {{.name = "a", .offset = 0, .bytes = 300}, {.name = "b", .offset = 512, .bytes = 512}});
    ASSERT_TRUE(made.ok()) << made.status();
    shadow_.emplace(*std::move(made));
    ASSERT_TRUE(shadow_->Write(kBoth, false).ok());
  }
  void Overwrite() { std::fill(live_.memory.begin(), live_.memory.end(), std::byte{2}); }

  const std::vector<size_t> kBoth = {0, 1};
  FakeLive live_;
  std::optional<WeightShadow> shadow_;
};

TEST_F(WeightShadowTest, BringsBackTheTensorsItIsAskedFor) {
  Overwrite();
  ASSERT_TRUE(shadow_->Restore(std::vector<size_t>{1}, false).ok());
  EXPECT_EQ(shadow_->done(), 1024);  // written, and read back
  EXPECT_EQ(shadow_->total(), 1024);
  EXPECT_EQ(std::count(live_.memory.begin(), live_.memory.begin() + 512, std::byte{2}), 512);
  EXPECT_EQ(std::count(live_.memory.begin() + 512, live_.memory.end(), std::byte{1}), 512);
}

TEST_F(WeightShadowTest, NoticesWhatDidNotComeBack) {
  Overwrite();
  live_.writes = false;
  const absl::Status status = shadow_->Restore(kBoth, false);
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_TRUE(absl::StartsWith(status.message(), "a: digest ")) << status;
}

TEST_F(WeightShadowTest, FollowsWhatServes) {
  Overwrite();
  ASSERT_TRUE(shadow_->Write(std::vector<size_t>{0}, false).ok());
  ASSERT_TRUE(shadow_->Restore(kBoth, false).ok());
  EXPECT_EQ(std::count(live_.memory.begin(), live_.memory.begin() + 300, std::byte{2}), 300);
  EXPECT_EQ(std::count(live_.memory.begin() + 512, live_.memory.end(), std::byte{1}), 512);
}

TEST_F(WeightShadowTest, StopsWhenItIsAskedTo) {
  EXPECT_TRUE(absl::IsCancelled(shadow_->Write(kBoth, true)));
  EXPECT_TRUE(absl::IsCancelled(shadow_->Restore(kBoth, true)));
}

}  // namespace
}  // namespace lockstep

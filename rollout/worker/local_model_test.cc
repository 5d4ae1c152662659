// How memory is divided between recurrent states and KV pages.
#include "rollout/worker/local_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

class FitMemoryTest : public testing::Test {
 protected:
  FitMemoryTest()
      : model_(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1)),
        slot_(MakeStateLayout(model_->spec, model_->ops()).bytes),
        page_(KvBytesPerPage(model_->spec, model_->ops(), kPage)) {}

  absl::StatusOr<LoopConfig> Fit(int64_t bytes, int64_t max_sequences = 64, int64_t min_tokens = kPage) {
    return FitMemory(*model_, {.page_size = kPage, .max_sequences = max_sequences}, bytes, min_tokens);
  }

  static constexpr int64_t kPage = 64;
  std::unique_ptr<LocalModel> model_;
  const int64_t slot_, page_;
};

TEST_F(FitMemoryTest, AllSlotsAndTheRestInPagesWhereThereIsRoom) {
  const auto config = Fit(10 * slot_ + 100 * page_, /*max_sequences=*/4);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_sequences, 4);
  EXPECT_EQ(config->max_kv_tokens, (6 * slot_ + 100 * page_) / page_ * kPage);
}

TEST_F(FitMemoryTest, StatesTakeHalfAtMostSoThatSequencesHavePages) {
  const int64_t bytes = 20 * slot_;
  const auto config = Fit(bytes);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_sequences, 10);
  EXPECT_EQ(config->max_kv_tokens, 10 * slot_ / page_ * kPage);
}

TEST_F(FitMemoryTest, OneSequenceRunsInWhatItNeeds) {
  const auto config = Fit(slot_ + page_);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_sequences, 1);
  EXPECT_EQ(config->max_kv_tokens, kPage);
}

TEST_F(FitMemoryTest, LessIsRefusedWithTheNumbers) {
  const auto config = Fit(slot_ + page_ - 1);
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(std::to_string(slot_ + page_)));
}

}  // namespace
}  // namespace lockstep

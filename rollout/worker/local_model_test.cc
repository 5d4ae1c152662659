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

// The CPU's, with a sampler that keeps something of every request.
class KeepingBackend final : public Backend {
 public:
  explicit KeepingBackend(std::unique_ptr<Backend> cpu) : cpu_(std::move(cpu)) {}
  std::string device() const override { return cpu_->device(); }
  Ops& ops() override { return cpu_->ops(); }
  absl::StatusOr<double> MeasureBandwidth() override { return cpu_->MeasureBandwidth(); }
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t vocab, int64_t requests) override {
    return cpu_->MakeSampler(vocab, requests);
  }
  int64_t SamplerBytesPerRequest(int64_t vocab) const override { return 1000 * vocab; }

 private:
  std::unique_ptr<Backend> cpu_;
};

TEST_F(FitMemoryTest, EverySlotHasRoomForARequestsLists) {
  model_->backend = std::make_unique<KeepingBackend>(std::move(model_->backend));
  const int64_t slot = slot_ + 1000 * model_->spec.vocab_size;
  const int64_t bytes = 4 * slot + 10 * slot + 100 * page_;
  const auto config = Fit(bytes, /*max_sequences=*/4);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_sequences, 4);
  EXPECT_EQ(config->max_kv_tokens, (10 * slot + 100 * page_) / page_ * kPage);
  EXPECT_TRUE(Fit(slot + page_).ok());
  EXPECT_FALSE(Fit(slot + page_ - 1).ok());
  // What the engine then takes is what was planned.
  const auto local = MakeLocalLoop(*model_, *config);
  ASSERT_TRUE(local.ok()) << local.status();
  const MemoryPlan& plan = local->engine->memory();
  EXPECT_EQ(plan.token_lists, 1000 * model_->spec.vocab_size);
  EXPECT_LE(plan.total() - plan.weights - plan.activations - plan.workspace, bytes);
  EXPECT_GT(plan.total() - plan.weights - plan.activations - plan.workspace, bytes - page_);
}

}  // namespace
}  // namespace lockstep

// Tensors that arrive by both ways, the stream and an inbox: nothing that arrived is lost, and nothing is made up.
#include "rollout/worker/model_tensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/testing/random_model.h"
#include "weights_sync/digest.h"

namespace lockstep {
namespace {

// In the place of what serves, or beside it.
class ModelTensorsTest : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    auto made = ModelTensors::Create("/no/checkpoint", model_->spec, model_->weights, model_->ops(),
                                     {.direct = GetParam(), .inbox_bytes = 1 << 20});
    ASSERT_TRUE(made.ok()) << made.status();
    table_ = *std::move(made);
    // A GDN layer's convolution is the one tensor that may come in parts.
    const std::span<const TensorSlot> slots = table_->slots();
    conv_ =
        std::find_if(slots.begin(), slots.end(), [](const TensorSlot& s) { return !s.parts.empty(); }) - slots.begin();
    ASSERT_LT(conv_, slots.size());
    for (const LayerWeights& layer : model_->weights.layers) {
      if (serving_ == nullptr && layer.gdn.conv != nullptr) {
        serving_ = static_cast<const float*>(layer.gdn.conv->data());
      }
    }
    table_->BeginUpdate();
  }
  const TensorSlot& conv() const { return table_->slots()[conv_]; }
  int64_t rows() const { return conv().shape[0]; }
  int64_t row() const { return conv().shape[1] * conv().shape[2]; }
  ExpectedTensor Rows(int64_t first, int64_t count) const {
    return {.slot = conv_, .first_row = first, .rows = count, .dtype = DType::kF32};
  }
  absl::Status Push(int64_t first, int64_t count, float value) {
    const std::vector<float> values(count * row(), value);
    return table_->Stage({.slot = conv_,
                          .first_row = first,
                          .rows = count,
                          .data = reinterpret_cast<const std::byte*>(values.data()),
                          .dtype = DType::kF32,
                          .digest = Digest(std::as_bytes(std::span(values)))});
  }

  const std::unique_ptr<LocalModel> model_ = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  std::unique_ptr<ModelTensors> table_;
  size_t conv_ = 0;
  const float* serving_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Modes, ModelTensorsTest, ::testing::Bool(),
                         [](const auto& mode) { return mode.param ? "Direct" : "Staged"; });

TEST_P(ModelTensorsTest, PartsOfOneTensorByBothWaysAreRefused) {
  const int64_t part = conv().part_rows[0][0];
  TensorInbox& inbox = *table_->inbox();
  ASSERT_TRUE(inbox.Open({Rows(0, part)}).ok());
  ASSERT_TRUE(inbox.Acquire(0).ok());
  std::fill_n(reinterpret_cast<float*>(inbox.buffer(0)), part * row(), 1.0f);
  ASSERT_TRUE(inbox.Stage(0, std::vector<ArrivedPiece>{{.count = part * row()}}).ok());
  ASSERT_TRUE(inbox.Close().ok());
  // The stream's rows would take zeros for those of the inbox with them.
  EXPECT_TRUE(absl::IsFailedPrecondition(Push(part, rows() - part, 2.0f)));
}

TEST_P(ModelTensorsTest, ARefusedOpenLeavesWhatHasArrived) {
  ASSERT_TRUE(Push(0, rows(), 3.0f).ok());
  ExpectedTensor unaligned = Rows(0, 1);
  for (size_t s = 0; s < table_->slots().size(); ++s) {
    if (table_->slots()[s].shape.size() == 1) unaligned = {.slot = s, .first_row = 1, .rows = 1};
  }
  EXPECT_TRUE(absl::IsInvalidArgument(table_->inbox()->Open({Rows(0, rows()), unaligned})));
  ASSERT_TRUE(table_->Finish().ok());
  ASSERT_TRUE(table_->Install({0, 1}).ok());
  EXPECT_EQ(serving_[0], 3.0f);
  const std::atomic<bool> cancelled = false;
  if (table_->shadow() != nullptr) {
    EXPECT_TRUE(table_->shadow()->Write(cancelled).ok());
  }
}

// The embedding is overwritten by the head's values: it must be restored with it.
TEST(DirectModelTensorsTest, ATiedHeadsValuesTouchWhatItIsTiedTo) {
  const std::unique_ptr<LocalModel> model = MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1);
  model->spec.tied_embeddings = true;
  auto table = ModelTensors::Create("/no/checkpoint", model->spec, model->weights, model->ops(),
                                    {.direct = true, .inbox_bytes = 1 << 20});
  ASSERT_TRUE(table.ok()) << table.status();
  const size_t head = (*table)->slots().size() - 1;
  ASSERT_EQ((*table)->slots()[head].tied_to, 0);
  const int64_t rows = model->spec.vocab_size, values = rows * model->spec.hidden_size;
  (*table)->BeginUpdate();
  TensorInbox& inbox = *(*table)->inbox();
  ASSERT_TRUE(inbox.Open({{.slot = head, .rows = rows, .dtype = DType::kF32}}).ok());
  ASSERT_TRUE(inbox.Acquire(0).ok());
  std::fill_n(reinterpret_cast<float*>(inbox.buffer(0)), values, 1.0f);
  ASSERT_TRUE(inbox.Stage(0, std::vector<ArrivedPiece>{{.count = values}}).ok());
  const std::atomic<bool> cancelled = false;
  ASSERT_TRUE((*table)->shadow()->Restore(cancelled).ok());
  // Each byte of both counts twice: when it is written, and when it is read back.
  EXPECT_EQ((*table)->shadow()->progress().total, 2 * 2 * values * DTypeBytes(DType::kF32));
}

// A checkpoint of which already the header takes a while to read.
TEST_P(ModelTensorsTest, InstallDoesNotWaitForDigestsThatAreReadFromFiles) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / "slow_checkpoint";
  std::filesystem::create_directories(dir);
  {
    std::string header = "{\"a\":[0";
    for (int i = 0; i < 5'000'000; ++i) header += ",0";
    header += "]}";
    std::ofstream file(dir / "model.safetensors", std::ios::binary);
    const uint64_t length = header.size();
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << header;
  }
  auto table = ModelTensors::Create(dir, model_->spec, model_->weights, model_->ops(), {.direct = GetParam()});
  ASSERT_TRUE(table.ok()) << table.status();
  (*table)->BeginUpdate();
  absl::Notification started, done;
  absl::Status status;
  std::thread reader([&] {
    started.Notify();
    status = (*table)->ServingDigests().status();
    done.Notify();
  });
  started.WaitForNotification();
  absl::SleepFor(absl::Milliseconds(20));  // until it reads
  EXPECT_TRUE((*table)->Install({0, 1}).ok());
  EXPECT_FALSE(done.HasBeenNotified()) << "the steps stood still for so long";
  reader.join();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  std::filesystem::remove_all(dir);
}

TEST_P(ModelTensorsTest, DigestsOfFilesThatHaveTakenTheCheckpointsPlaceAreRefused) {
  const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / "replaced_checkpoint";
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "model.safetensors") << "those that serve";
  auto table = ModelTensors::Create(dir, model_->spec, model_->weights, model_->ops(), {.direct = GetParam()});
  ASSERT_TRUE(table.ok()) << table.status();
  std::ofstream(dir / "model.safetensors") << "the next ones";
  const absl::Status status = (*table)->ServingDigests().status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(status.message(), testing::HasSubstr("has changed since the worker loaded it"));
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace lockstep

// Values through the device's inbox against the CPU's, beside the weights in use and in their place; and the weights in
// use read, overwritten and put back.
#include "kernels/cuda/weight_inbox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/weight_stage.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/weight_stage.h"
#include "kernels/digest_math.h"
#include "kernels/host_values.h"
#include "rollout/base/memory.h"
#include "rollout/base/thread_pool.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kBufferBytes = 1 << 20;
constexpr int64_t kStageBytes = 4 << 20;

struct Case {
  DType sent, held, stored;
  int64_t count;
};

class WeightInboxTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    auto inbox = CudaWeightInbox::Create(kBufferBytes, 4);
    ASSERT_TRUE(inbox.ok()) << inbox.status();
    inbox_ = *std::move(inbox);
    auto stage = CudaWeightStage::Create(kStageBytes);
    ASSERT_TRUE(stage.ok()) << stage.status();
    stage_ = *std::move(stage);
    auto cpu = CpuWeightInbox::Create(kBufferBytes, 4);
    ASSERT_TRUE(cpu.ok()) << cpu.status();
    cpu_inbox_ = *std::move(cpu);
    auto arena = Arena::Map(kStageBytes);
    ASSERT_TRUE(arena.ok()) << arena.status();
    cpu_stage_ = std::make_unique<CpuWeightStage>(*std::move(arena));
    Poison();
  }

  // Bytes that no test writes are alike in both, and are not zero.
  void Poison() {
    const std::vector<std::byte> bytes(kStageBytes, std::byte{0xA5});
    ASSERT_TRUE(stage_->Write(0, bytes).ok());
    ASSERT_TRUE(stage_->Finish().ok());
    ASSERT_TRUE(cpu_stage_->Write(0, bytes).ok());
  }

  std::vector<std::byte> DeviceStage() {
    std::vector<std::byte> bytes(kStageBytes);
    EXPECT_EQ(cudaMemcpy(bytes.data(), stage_->Address(0, kStageBytes), kStageBytes, cudaMemcpyDeviceToHost),
              cudaSuccess);
    return bytes;
  }

  // Finite values of every size, some halfway between two bfloat16 values.
  std::vector<std::byte> Values(DType dtype, int64_t count) {
    std::vector<std::byte> bytes(count * DTypeBytes(dtype));
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::kF32) {
        uint32_t bits = static_cast<uint32_t>(random_());
        if (i % 3 == 0) bits = (bits & 0xFFFF0000u) | 0x8000u;
        if ((bits & 0x7F800000u) == 0x7F800000u) bits &= 0xBFFFFFFFu;
        std::memcpy(bytes.data() + i * 4, &bits, 4);
      } else {
        uint16_t bits = static_cast<uint16_t>(random_());
        const uint16_t exponent = dtype == DType::kBF16 ? 0x7F80 : 0x7C00;
        if ((bits & exponent) == exponent) bits &= 0xBFFF;
        std::memcpy(bytes.data() + i * 2, &bits, 2);
      }
    }
    return bytes;
  }

  std::mt19937_64 random_{7};
  std::unique_ptr<CudaWeightInbox> inbox_;
  std::unique_ptr<CudaWeightStage> stage_;
  std::unique_ptr<CpuWeightInbox> cpu_inbox_;
  std::unique_ptr<CpuWeightStage> cpu_stage_;
};

TEST_F(WeightInboxTest, EqualsTheCpu) {
  for (const DType sent : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const auto& [held, stored] :
         {std::pair{DType::kBF16, DType::kBF16}, {DType::kBF16, DType::kF32}, {DType::kF32, DType::kF32}}) {
      for (const int64_t count : {1, 2, 3, 4, 5, 30, 1023, 1024, 200'003}) {
        SCOPED_TRACE(testing::Message() << DTypeName(sent) << " " << DTypeName(held) << " " << DTypeName(stored) << " "
                                        << count);
        ASSERT_TRUE(inbox_->Reset().ok());
        ASSERT_TRUE(cpu_inbox_->Reset().ok());
        const std::vector<std::byte> values = Values(sent, count);
        // In two pieces, through both buffers.
        const int64_t cut = count / 2 / 4 * 4;
        for (int which = 0; which < 2; ++which) {
          const int64_t begin = which == 0 ? 0 : cut, size = which == 0 ? cut : count - cut;
          const std::byte* from = values.data() + begin * DTypeBytes(sent);
          const int64_t bytes = size * DTypeBytes(sent);
          ASSERT_TRUE(inbox_->Acquire(which).ok());
          ASSERT_EQ(cudaMemcpyAsync(inbox_->buffer(which) + 256, from, bytes, cudaMemcpyHostToDevice,
                                    static_cast<cudaStream_t>(inbox_->stream())),
                    cudaSuccess);
          std::memcpy(cpu_inbox_->buffer(which) + 256, from, bytes);
          ASSERT_TRUE(inbox_->Arrived().ok());
          InboxValues piece = {.sent = sent,
                               .count = size,
                               .sent_index = begin,
                               .held_index = 64 + begin,
                               .held = held,
                               .to = 512 + begin * DTypeBytes(stored),
                               .stored = stored,
                               .tally = 2};
          piece.from = inbox_->buffer(which) + 256;
          ASSERT_TRUE(inbox_->Store(piece, *stage_).ok());
          piece.from = cpu_inbox_->buffer(which) + 256;
          ASSERT_TRUE(cpu_inbox_->Store(piece, *cpu_stage_).ok());
          ASSERT_TRUE(inbox_->Release(which).ok());
        }
        absl::StatusOr<bool> idle = false;
        while (idle.ok() && !*idle) idle = inbox_->Idle();
        ASSERT_TRUE(idle.ok()) << idle.status();
        const auto tallies = inbox_->Tallies(), expected = cpu_inbox_->Tallies();
        ASSERT_TRUE(tallies.ok() && expected.ok());
        EXPECT_EQ((*tallies)[2].sent_sum, (*expected)[2].sent_sum);
        EXPECT_EQ((*tallies)[2].held_sum, (*expected)[2].held_sum);
        EXPECT_EQ((*tallies)[2].non_finite, 0u);
        EXPECT_EQ((*tallies)[1].sent_sum, 0u);
        const std::vector<std::byte> stage = DeviceStage();
        EXPECT_EQ(std::memcmp(stage.data(), cpu_stage_->Address(0, kStageBytes), kStageBytes), 0);
      }
    }
  }
}

TEST_F(WeightInboxTest, CountsWhatIsNotFinite) {
  const std::vector<float> values = {1, INFINITY, -2, NAN, -INFINITY, 0};
  ASSERT_TRUE(inbox_->Reset().ok());
  ASSERT_EQ(cudaMemcpy(inbox_->buffer(0), values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice),
            cudaSuccess);
  ASSERT_TRUE(inbox_->Arrived().ok());
  ASSERT_TRUE(inbox_->Store({.from = inbox_->buffer(0), .count = 6, .stored = DType::kF32, .tally = 0}, *stage_).ok());
  const auto tallies = inbox_->Tallies();
  ASSERT_TRUE(tallies.ok());
  EXPECT_EQ((*tallies)[0].non_finite, 3u);
}

// Weights in use, of every kind, as the backend makes them.
class LiveWeightsTest : public WeightInboxTest {
 protected:
  void SetUp() override {
    WeightInboxTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    const auto profile = FindNumericsProfile("hf");
    ASSERT_TRUE(profile.ok());
    profile_ = *profile;
    auto ops = CudaOps::Create(profile_, &threads_, {});
    ASSERT_TRUE(ops.ok()) << ops.status();
    ops_ = *std::move(ops);
    const std::vector<std::byte> a = Values(DType::kBF16, 24 * kCols), b = Values(DType::kBF16, 40 * kCols);
    const HostMatrix parts[] = {{a.data(), 24, kCols, DType::kBF16}, {b.data(), 40, kCols, DType::kBF16}};
    auto linear = ops_->PackLinear(parts);
    ASSERT_TRUE(linear.ok()) << linear.status();
    linear_ = *std::move(linear);
    const std::vector<std::byte> table = Values(DType::kBF16, 50 * kCols);
    auto embedding = ops_->PackEmbedding({table.data(), 50, kCols, DType::kBF16});
    ASSERT_TRUE(embedding.ok()) << embedding.status();
    embedding_ = *std::move(embedding);
    auto vector = ops_->PackVector(std::vector<float>(30, 0.25f), /*exact=*/true);
    ASSERT_TRUE(vector.ok()) << vector.status();
    vector_ = *std::move(vector);
    places_ = {
        {.linear = linear_.get(), .rows = 24, .cols = kCols, .dtype = DType::kBF16, .offset = 0},
        {.linear = linear_.get(), .first_row = 24, .rows = 40, .cols = kCols, .dtype = DType::kBF16, .offset = 1 << 16},
        {.embedding = embedding_.get(), .rows = 50, .cols = kCols, .dtype = DType::kBF16, .offset = 2 << 16},
        {.vector = vector_.get(), .rows = 30, .cols = 1, .dtype = DType::kF32, .offset = 3 << 16}};
    auto live = ops_->MakeLiveWeights(places_);
    ASSERT_TRUE(live.ok()) << live.status();
    live_ = *std::move(live);
  }

  std::vector<std::byte> Read(const WeightPlace& place) {
    std::vector<std::byte> bytes(place.bytes());
    EXPECT_TRUE(live_->Read(place.offset, bytes).ok());
    return bytes;
  }
  // What the steps read, past LiveWeights.
  std::vector<std::byte> InUse(const WeightPlace& place) {
    std::vector<std::byte> bytes(place.bytes());
    ops_->CopyToHost(bytes.data(), live_->Address(place.offset, place.bytes()), place.bytes());
    EXPECT_TRUE(ops_->status().ok());
    return bytes;
  }
  // As an update in place does it: through the inbox, from fp32.
  void Receive(const WeightPlace& place, const std::vector<std::byte>& sent, DType held) {
    ASSERT_TRUE(inbox_->Acquire(0).ok());
    ASSERT_EQ(cudaMemcpyAsync(inbox_->buffer(0), sent.data(), sent.size(), cudaMemcpyHostToDevice,
                              static_cast<cudaStream_t>(inbox_->stream())),
              cudaSuccess);
    ASSERT_TRUE(inbox_->Arrived().ok());
    const InboxValues values = {.from = inbox_->buffer(0),
                                .count = place.rows * place.cols,
                                .held = held,
                                .to = place.offset,
                                .stored = place.dtype,
                                .tally = 0};
    ASSERT_TRUE(inbox_->Store(values, *live_).ok());
    ASSERT_TRUE(inbox_->Release(0).ok());
    absl::StatusOr<bool> idle = false;
    while (idle.ok() && !*idle) idle = inbox_->Idle();
    ASSERT_TRUE(idle.ok()) << idle.status();
  }

  static constexpr int64_t kCols = 64;
  ThreadPool threads_{1};
  NumericsProfile profile_;
  std::unique_ptr<CudaOps> ops_;
  std::unique_ptr<LinearWeight> linear_;
  std::unique_ptr<EmbeddingTable> embedding_;
  std::unique_ptr<VectorWeight> vector_;
  std::vector<WeightPlace> places_;
  std::unique_ptr<LiveWeights> live_;
};

TEST_F(LiveWeightsTest, ReadGivesWhatStepsReadAndWriteChangesThatPlaceAlone) {
  for (size_t written = 0; written < places_.size(); ++written) {
    std::vector<std::vector<std::byte>> before;
    for (const WeightPlace& place : places_) {
      before.push_back(Read(place));
      EXPECT_EQ(before.back(), InUse(place));
    }
    const WeightPlace& place = places_[written];
    const std::vector<std::byte> values = Values(place.dtype, place.rows * place.cols);
    // In two pieces that meet within a row.
    const int64_t cut = static_cast<int64_t>(values.size()) / 2 / 8 * 8 + 4;
    ASSERT_TRUE(live_->Write(place.offset, std::span(values).first(cut)).ok());
    ASSERT_TRUE(live_->Write(place.offset + cut, std::span(values).subspan(cut)).ok());
    ASSERT_TRUE(live_->Finish().ok());
    for (size_t i = 0; i < places_.size(); ++i) {
      EXPECT_EQ(InUse(places_[i]), i == written ? values : before[i]) << written << " " << i;
    }
  }
}

TEST_F(LiveWeightsTest, AShadowUndoesWhatTheInboxWroteAndFollowsWhatIsCommitted) {
  ASSERT_TRUE(inbox_->Reset().ok());
  for (const size_t which : {size_t{1}, size_t{2}, size_t{3}}) {
    const WeightPlace& place = places_[which];
    const std::vector<std::byte> shadow = Read(place), sent = Values(DType::kF32, place.rows * place.cols);
    const DType held = place.vector != nullptr ? DType::kF32 : DType::kBF16;
    Receive(place, sent, held);
    std::vector<std::byte> want(place.bytes());
    ConvertValues(sent.data(), DType::kF32, place.rows * place.cols, place.dtype, want.data());
    EXPECT_EQ(InUse(place), want);
    ASSERT_NE(want, shadow);
    // Rolled back.
    ASSERT_TRUE(live_->Write(place.offset, shadow).ok());
    ASSERT_TRUE(live_->Finish().ok());
    EXPECT_EQ(InUse(place), shadow);
    // Sent again and committed: the next shadow.
    Receive(place, sent, held);
    EXPECT_EQ(Read(place), want);
  }
}

// More than the page-locked buffers hold at once.
TEST_F(LiveWeightsTest, LongTensorsComeAndGoWhole) {
  const int64_t rows = 70 << 13;  // 70 MiB
  std::vector<std::byte> values = Values(DType::kBF16, rows * kCols);
  auto weight = ops_->PackLinear(std::vector<HostMatrix>{{values.data(), rows, kCols, DType::kBF16}});
  ASSERT_TRUE(weight.ok()) << weight.status();
  const WeightPlace place = {.linear = weight->get(), .rows = rows, .cols = kCols, .dtype = DType::kBF16};
  auto live = ops_->MakeLiveWeights({&place, 1});
  ASSERT_TRUE(live.ok()) << live.status();
  std::vector<std::byte> read(values.size());
  ASSERT_TRUE((*live)->Read(0, read).ok());
  EXPECT_EQ(std::memcmp(read.data(), values.data(), read.size()), 0);
  std::reverse(values.begin(), values.end());
  ASSERT_TRUE((*live)->Write(0, values).ok());
  ASSERT_TRUE((*live)->Finish().ok());
  ASSERT_TRUE((*live)->Read(0, read).ok());
  EXPECT_EQ(std::memcmp(read.data(), values.data(), read.size()), 0);
  // Any bits, an end within a word, a beginning that is not the tensor's.
  const int64_t bytes = static_cast<int64_t>(values.size());
  for (const int64_t begin : {int64_t{0}, int64_t{8}, int64_t{1} << 20}) {
    for (const int64_t end : {bytes, bytes - 2, bytes - 6, begin + 2, begin}) {
      const auto sum = (*live)->SumInUse(begin, end - begin, begin / 8);
      ASSERT_TRUE(sum.ok()) << sum.status();
      EXPECT_EQ(*sum, DigestSum(std::span(values).subspan(begin, end - begin), begin / 8)) << begin << " to " << end;
    }
  }
}

TEST_F(WeightInboxTest, RefusesWhatItCannotRead) {
  const InboxValues good = {.from = inbox_->buffer(0), .count = 8, .tally = 0};
  InboxValues bad = good;
  bad.sent_index = 2;
  EXPECT_TRUE(absl::IsInvalidArgument(inbox_->Store(bad, *stage_)));
  bad = good;
  bad.from += 4;
  EXPECT_TRUE(absl::IsInvalidArgument(inbox_->Store(bad, *stage_)));
  bad = good;
  bad.stored = DType::kBF16;
  EXPECT_TRUE(absl::IsInvalidArgument(inbox_->Store(bad, *stage_)));
}

}  // namespace
}  // namespace lockstep::cuda

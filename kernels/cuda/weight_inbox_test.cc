// Values through the device's inbox against the CPU's, and the digest of the whole against weights_sync's own.
#include "kernels/cuda/weight_inbox.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "kernels/cpu/weight_stage.h"
#include "kernels/cuda/weight_stage.h"
#include "kernels/digest_math.h"
#include "rollout/base/memory.h"

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
    EXPECT_EQ(cudaMemcpy(bytes.data(), stage_->data(), kStageBytes, cudaMemcpyDeviceToHost), cudaSuccess);
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
        EXPECT_EQ(std::memcmp(stage.data(), cpu_stage_->data(), kStageBytes), 0);
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

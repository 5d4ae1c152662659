// What a Receive that is refused leaves as it was; tests/python and tests/service receive over tests/fake_nccl.
#include "weights_sync/nccl_receive.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "weights_sync/digest.h"

namespace lockstep {
namespace {

class OneBuffer final : public TensorInbox {
 public:
  int64_t buffer_bytes() const override { return 1024; }
  std::byte* buffer(int) override { return memory_.data(); }
  void* stream() override { return nullptr; }
  absl::Status UseOnThisThread() override { return absl::OkStatus(); }
  absl::Status Open(std::vector<ExpectedTensor>) override { return absl::OkStatus(); }
  absl::Status Acquire(int) override { return absl::OkStatus(); }
  absl::Status Stage(int, std::span<const ArrivedPiece>) override { return absl::OkStatus(); }
  absl::StatusOr<bool> Idle() override { return true; }
  absl::StatusOr<std::vector<ArrivedTensor>> Close() override { return std::vector<ArrivedTensor>(1); }

 private:
  std::array<std::byte, 1024> memory_;
};

class OneTensor final : public TensorTable {
 public:
  std::span<const TensorSlot> slots() const override { return slots_; }
  void BeginUpdate() override {}
  absl::Status Stage(const ArrivedRows&) override { return absl::OkStatus(); }
  TensorInbox* inbox() override { return &inbox_; }
  absl::Status Finish() override { return absl::OkStatus(); }
  absl::StatusOr<VersionDigests> ServingDigests() override { return VersionDigests(); }

 private:
  OneBuffer inbox_;
  std::vector<TensorSlot> slots_ = {{.name = "a", .shape = {4}}};
};

class NcclReceiveTest : public ::testing::Test {
 protected:
  NcclReceiveTest() {
    const auto library = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL).value();
    absl::MutexLock lock(&member.use);
    member.group = NcclGroup::Create(library, library->UniqueId().value(), 1, 0, absl::InfiniteFuture()).value();
  }
  void SetUp() override {
    const std::array<std::byte, 16> bytes = {};
    ASSERT_TRUE(update.Begin({0, 1}, {.tensors = {{"a", DType::kF32, {4}}}}, absl::Minutes(1)).ok());
    ASSERT_TRUE(update.Push({0, 1}, 0, 0, bytes).ok());
    ASSERT_TRUE(update.Verify({0, 1}, std::array{Digest(bytes)}).ok());
  }
  absl::Status Receive(int64_t bucket_bytes = 256) {
    return ReceiveOverNccl({.version = {0, 1}, .bucket_bytes = bucket_bytes, .deadline = absl::InfiniteFuture()},
                           update, member, signal, [this](int64_t) { begun = true; });
  }
  void ExpectAsItWas() {
    EXPECT_FALSE(begun);
    EXPECT_EQ(update.status().state, UpdateState::kVerified);
    EXPECT_EQ(update.status().received_bytes, 16);
  }

  OneTensor table;
  WeightUpdate update{&table, {}, nullptr};
  NcclGroups::Member member;
  ReceiveSignal signal;
  bool begun = false;
};

TEST_F(NcclReceiveTest, ABucketSizeThatCannotBe) {
  for (const int64_t bytes : {int64_t{2048}, int64_t{300}, int64_t{0}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Receive(bytes))) << bytes;
    ExpectAsItWas();
  }
  absl::MutexLock lock(&member.use);
  EXPECT_TRUE(member.group->healthy());
}

TEST_F(NcclReceiveTest, AGroupThatHasFailedOrWasLeft) {
  {
    absl::MutexLock lock(&member.use);
    member.group->Abort();
  }
  EXPECT_TRUE(absl::IsFailedPrecondition(Receive()));
  ExpectAsItWas();
  {
    absl::MutexLock lock(&member.use);
    member.group.reset();
  }
  EXPECT_TRUE(absl::IsCancelled(Receive()));
  ExpectAsItWas();
}

TEST_F(NcclReceiveTest, ASenderThatIsGone) {
  signal.Cancel(absl::AbortedError("why"));
  EXPECT_TRUE(absl::IsAborted(Receive()));
  ExpectAsItWas();
}

TEST_F(NcclReceiveTest, Received) {
  signal.Ready(1);
  member.join.nranks = 1;
  EXPECT_TRUE(Receive().ok());
  EXPECT_TRUE(begun);
  EXPECT_EQ(update.status().state, UpdateState::kReceiving) << "again";
}

}  // namespace
}  // namespace lockstep

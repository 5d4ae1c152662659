#include "weights_sync/update.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

// Knows what it was opened for; its tensors "arrive" when the test says so.
class FakeInbox final : public TensorInbox {
 public:
  int64_t buffer_bytes() const override { return 1024; }
  std::byte* buffer(int) override { return nullptr; }
  void* stream() override { return nullptr; }
  absl::Status UseOnThisThread() override { return absl::OkStatus(); }
  absl::Status Open(std::vector<ExpectedTensor> tensors) override {
    expected = std::move(tensors);
    return open_status;
  }
  absl::Status Acquire(int) override { return absl::OkStatus(); }
  absl::Status Stage(int, std::span<const ArrivedPiece>) override { return absl::OkStatus(); }
  absl::StatusOr<bool> Idle() override { return true; }
  absl::StatusOr<std::vector<ArrivedTensor>> Close() override { return arrived; }

  std::vector<ExpectedTensor> expected;
  std::vector<ArrivedTensor> arrived;
  absl::Status open_status;
};

// Counts what it is told.
class FakeGate final : public StepGate {
 public:
  absl::Status HoldSteps() override {
    if (!hold_status.ok()) return hold_status;
    held = true;
    return absl::OkStatus();
  }
  void ReleaseSteps() override { held = false; }
  void FailSteps(absl::Status why) override {
    absl::MutexLock lock(&mutex_);
    failure_ = std::move(why);
  }
  absl::Status failure() {
    absl::MutexLock lock(&mutex_);
    return failure_;
  }

  std::atomic<bool> held = false;
  absl::Status hold_status;

 private:
  absl::Mutex mutex_;
  absl::Status failure_;
};

// Of the two tensors that FakeTable's direct form has; restores, and is written, when the test lets it.
class FakeShadow final : public TensorShadow {
 public:
  using Values = std::map<size_t, std::vector<float>>;
  FakeShadow(Values* serving, FakeGate* gate) : serving_(*serving), gate_(*gate) {}
  absl::Status Restore(const std::atomic<bool>& cancelled) override {
    LOCKSTEP_RETURN_IF_ERROR(Await(cancelled));
    EXPECT_TRUE(gate_.held) << "restored while steps run";
    serving_ = copy;
    return restore_status;
  }
  absl::Status Write(const std::atomic<bool>& cancelled) override {
    LOCKSTEP_RETURN_IF_ERROR(Await(cancelled));
    copy = serving_;
    return absl::OkStatus();
  }
  Progress progress() const override { return {.done = 3, .total = 40}; }

  Values copy;
  std::atomic<bool> blocked = false;
  absl::Status restore_status;

 private:
  absl::Status Await(const std::atomic<bool>& cancelled) const {
    for (; blocked; absl::SleepFor(absl::Milliseconds(1))) {
      if (cancelled) return absl::CancelledError("");
    }
    return absl::OkStatus();
  }
  Values& serving_;
  FakeGate& gate_;
};

// Two tensors of 4 and 6 floats, kept as they come: beside those that serve, or in their place.
class FakeTable final : public TensorTable {
 public:
  explicit FakeTable(FakeGate* gate = nullptr) : gate_(gate) {
    if (gate == nullptr) return;
    serving = {{0, std::vector<float>(4)}, {1, std::vector<float>(6)}};
    fake_shadow_.emplace(&serving, gate);
    fake_shadow_->copy = serving;
  }
  std::span<const TensorSlot> slots() const override { return slots_; }
  void BeginUpdate() override { second = serving; }
  TensorShadow* shadow() override { return fake_shadow_ ? &*fake_shadow_ : nullptr; }
  FakeShadow& fake_shadow() { return *fake_shadow_; }
  absl::Status Stage(const ArrivedRows& rows) override {
    EXPECT_TRUE(gate_ == nullptr || gate_->held) << "what serves is overwritten while steps run";
    if (!stage_status.ok()) return stage_status;
    std::vector<float>& to = gate_ != nullptr ? serving[rows.slot] : second[rows.slot];
    to.resize(rows.slot == 0 ? 4 : 6);
    std::memcpy(to.data(), rows.data, to.size() * sizeof(float));
    return absl::OkStatus();
  }
  TensorInbox* inbox() override { return has_inbox ? &inbox_ : nullptr; }
  FakeInbox& fake_inbox() { return inbox_; }
  absl::Status Finish() override { return absl::OkStatus(); }
  absl::StatusOr<VersionDigests> ServingDigests() override { return VersionDigests(); }
  void Install() {
    if (gate_ == nullptr) {
      serving = second;
    } else {
      gate_->ReleaseSteps();
    }
  }

  std::map<size_t, std::vector<float>> serving, second;
  absl::Status stage_status;
  bool has_inbox = true;

 private:
  FakeGate* const gate_;
  std::optional<FakeShadow> fake_shadow_;
  FakeInbox inbox_;
  std::vector<TensorSlot> slots_ = {{.name = "a", .shape = {4}}, {.name = "b", .shape = {2, 3}}};
};

Manifest Whole() {
  return {.tensors = {{"a", DType::kF32, {4}}, {"b", DType::kF32, {2, 3}}}};
}

std::vector<std::byte> Bytes(const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

class UpdateTest : public ::testing::Test {
 protected:
  explicit UpdateTest(bool direct = false) : table(direct ? &gate : nullptr) {}
  // The values that version `step` sends.
  static std::vector<float> Values(int64_t step, int tensor) {
    std::vector<float> values(tensor == 0 ? 4 : 6);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(step * 100 + tensor * 10) + static_cast<float>(i);
    return values;
  }
  static std::vector<uint64_t> Digests(int64_t step) {
    return {Digest(Bytes(Values(step, 0))), Digest(Bytes(Values(step, 1)))};
  }
  absl::Status Send(int64_t step, int tensor) { return update.Push({0, step}, tensor, 0, Bytes(Values(step, tensor))); }
  absl::Status Commit(int64_t step) {
    return update.Commit({0, step}, [&](const auto&) {
      table.Install();
      return absl::OkStatus();
    });
  }
  void Receive(int64_t step) {
    ASSERT_TRUE(update.Begin({0, step}, Whole(), absl::Minutes(1)).ok());
    ASSERT_TRUE(Send(step, 0).ok());
    ASSERT_TRUE(Send(step, 1).ok());
  }

  FakeGate gate;
  FakeTable table;
  WeightUpdate update{&table, {}, &gate};
};

TEST_F(UpdateTest, OneUpdate) {
  Receive(1);
  EXPECT_EQ(update.status().state, UpdateState::kReceiving);
  EXPECT_EQ(update.status().received_bytes, 40);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok()) << "again";
  // As a learner sends it that was restarted between two workers' Commits.
  Receive(1);
  EXPECT_EQ(update.status().state, UpdateState::kVerified);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(table.serving.empty());
  ASSERT_TRUE(Commit(1).ok());
  ASSERT_TRUE(Commit(1).ok()) << "again";
  EXPECT_EQ(table.serving[1], Values(1, 1));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  EXPECT_EQ(update.serving(), (WeightVersion{0, 1}));
}

TEST_F(UpdateTest, ChunksResumeWhereTheyBroke) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  const std::vector<std::byte> bytes = Bytes(Values(1, 1));
  ASSERT_TRUE(update.Push({0, 1}, 1, 0, std::span(bytes).first(8)).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Push({0, 1}, 1, 12, std::span(bytes).subspan(12)))) << "a gap";
  // The stream broke; the sender asks and goes on, and sends some bytes again.
  const auto received = update.Begin({0, 1}, Whole(), absl::Minutes(1));
  ASSERT_TRUE(received.ok());
  EXPECT_EQ(*received, (std::vector<int64_t>{0, 8}));
  ASSERT_TRUE(update.Push({0, 1}, 1, 4, std::span(bytes).subspan(4)).ok());
  ASSERT_TRUE(update.Push({0, 1}, 1, 0, bytes).ok()) << "all of it again";
  ASSERT_TRUE(Send(1, 0).ok());
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
}

TEST_F(UpdateTest, BadChunks) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  const std::vector<std::byte> bytes(64);
  for (const auto& [tensor, offset, size] :
       {std::array<int64_t, 3>{2, 0, 4}, {-1, 0, 4}, {0, -4, 4}, {0, 0, 20}, {0, 2, 4}, {0, 0, 3}, {0, 20, 0}}) {
    const absl::Status status = update.Push({0, 1}, tensor, offset, std::span(bytes).first(size));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << tensor << " " << offset << " " << size << ": " << status;
  }
}

TEST_F(UpdateTest, CorruptionIsDataLossAndRollsBack) {
  Receive(1);
  std::vector<uint64_t> digests = Digests(1);
  digests[1] ^= 1;
  const absl::Status status = update.Verify({0, 1}, digests);
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "b (digest")) << status;
  EXPECT_FALSE(absl::StrContains(status.message(), "a (digest"));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  EXPECT_TRUE(absl::IsNotFound(Commit(1)));

  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  std::vector<float> bad = Values(1, 0);
  bad[2] = std::numeric_limits<float>::infinity();
  ASSERT_TRUE(update.Push({0, 1}, 0, 0, Bytes(bad)).ok());
  ASSERT_TRUE(Send(1, 1).ok());
  const absl::Status infinite = update.Verify({0, 1}, std::vector<uint64_t>{Digest(Bytes(bad)), Digests(1)[1]});
  EXPECT_TRUE(absl::IsDataLoss(infinite));
  EXPECT_TRUE(absl::StrContains(infinite.message(), "a (1 values are NaN or infinite)")) << infinite;
}

TEST_F(UpdateTest, AFailedStageDropsTheUpdate) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  table.stage_status = absl::InternalError("the device");
  EXPECT_TRUE(absl::IsInternal(Send(1, 0)));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
}

TEST_F(UpdateTest, LeaseEndsAnAbandonedUpdate) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Milliseconds(20)).ok());
  absl::SleepFor(absl::Milliseconds(40));
  EXPECT_TRUE(absl::IsNotFound(Send(1, 0)));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  Receive(1);
}

TEST_F(UpdateTest, SubsetOverABaseVersion) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  ASSERT_TRUE(Commit(1).ok());
  // Dirties the second place.
  Receive(2);
  ASSERT_TRUE(update.Rollback({0, 2}).ok());
  Manifest subset = {.tensors = {{"a", DType::kF32, {4}}}, .base_version = WeightVersion{0, 0}};
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Begin({0, 3}, subset, absl::Minutes(1)).status()));
  subset.base_version = WeightVersion{0, 1};
  ASSERT_TRUE(update.Begin({0, 3}, subset, absl::Minutes(1)).ok());
  ASSERT_TRUE(Send(3, 0).ok());
  ASSERT_TRUE(update.Verify({0, 3}, std::vector<uint64_t>{Digests(3)[0]}).ok());
  ASSERT_TRUE(Commit(3).ok());
  EXPECT_EQ(table.serving[0], Values(3, 0));
  EXPECT_EQ(table.serving[1], Values(1, 1));
}

TEST_F(UpdateTest, AFailedInstallLeavesItVerified) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(update.Commit({0, 1}, [](const auto&) { return absl::DeadlineExceededError("busy"); })));
  EXPECT_EQ(update.status().state, UpdateState::kVerified);
  ASSERT_TRUE(Commit(1).ok());
}

// Its connection broke while the first went on: a learner must not take the update for failed.
TEST_F(UpdateTest, CommitSentAgainEndsAsTheFirstDoes) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  absl::Notification installing, go_on;
  int installs = 0;
  absl::Status first, second;
  std::thread one([&] {
    first = update.Commit({0, 1}, [&](const auto&) {
      ++installs;
      installing.Notify();
      go_on.WaitForNotification();
      return absl::OkStatus();
    });
  });
  installing.WaitForNotification();
  absl::Notification answered;
  std::thread two([&] {
    second = update.Commit({0, 1}, [&](const auto&) {
      ++installs;
      return absl::OkStatus();
    });
    answered.Notify();
  });
  EXPECT_FALSE(answered.WaitForNotificationWithTimeout(absl::Milliseconds(100)));
  go_on.Notify();
  one.join();
  two.join();
  EXPECT_TRUE(first.ok()) << first;
  EXPECT_TRUE(second.ok()) << second;
  EXPECT_EQ(installs, 1);
  EXPECT_EQ(update.serving(), (WeightVersion{0, 1}));
}

// What a Commit does that waits for samples in flight.
absl::Status WaitUntilGivenUp(const std::function<bool()>& given_up) {
  while (!given_up()) absl::SleepFor(absl::Milliseconds(1));
  return absl::CancelledError("given up");
}

TEST_F(UpdateTest, ACommitWaitsNoLongerThanItsCall) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(absl::IsCancelled(update.Commit({0, 1}, WaitUntilGivenUp, {.cancelled = [] { return true; }})))
      << "before it has begun";
  bool gone = false;
  const auto leave = [&](const auto& given_up) {
    EXPECT_FALSE(given_up());
    gone = true;
    return WaitUntilGivenUp(given_up);
  };
  EXPECT_TRUE(absl::IsCancelled(update.Commit({0, 1}, leave, {.cancelled = [&] { return gone; }})));
  EXPECT_EQ(update.status().state, UpdateState::kVerified);
  EXPECT_GT(update.status().lease_left, absl::ZeroDuration());
  EXPECT_TRUE(
      absl::IsCancelled(update.Commit({0, 1}, WaitUntilGivenUp, {.deadline = absl::Now() + absl::Milliseconds(5)})));
  EXPECT_EQ(update.status().state, UpdateState::kVerified);
  ASSERT_TRUE(Commit(1).ok());
}

TEST_F(UpdateTest, ACommitSentAgainWaitsNoLongerThanItsCall) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  absl::Notification installing, go_on;
  std::thread first([&] {
    EXPECT_TRUE(update
                    .Commit({0, 1},
                            [&](const auto&) {
                              installing.Notify();
                              go_on.WaitForNotification();
                              return absl::OkStatus();
                            })
                    .ok());
  });
  installing.WaitForNotification();
  const auto never = [](const auto&) { return absl::InternalError("installed twice"); };
  EXPECT_TRUE(absl::IsUnavailable(update.Commit({0, 1}, never, {.deadline = absl::Now() + absl::Milliseconds(5)})));
  EXPECT_TRUE(absl::IsCancelled(update.Commit({0, 1}, never, {.cancelled = [] { return true; }})));
  go_on.Notify();
  first.join();
  EXPECT_EQ(update.serving(), (WeightVersion{0, 1}));
}

class UpdateInBothModes : public UpdateTest, public ::testing::WithParamInterface<bool> {
 protected:
  UpdateInBothModes() : UpdateTest(GetParam()) {}
};
INSTANTIATE_TEST_SUITE_P(Modes, UpdateInBothModes, ::testing::Bool(),
                         [](const auto& mode) { return mode.param ? "Direct" : "Staged"; });

TEST_P(UpdateInBothModes, RollbackEndsACommitThatWaits) {
  const auto before = table.serving;
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  absl::Notification waits;
  absl::Status committed;
  std::thread commit([&] {
    committed = update.Commit({0, 1}, [&](const auto& given_up) {
      waits.Notify();
      return WaitUntilGivenUp(given_up);
    });
  });
  waits.WaitForNotification();
  const absl::StatusOr<bool> dropped = update.Rollback({0, 1});
  commit.join();
  ASSERT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_TRUE(*dropped);
  EXPECT_TRUE(absl::IsCancelled(committed)) << committed;
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  EXPECT_EQ(update.serving(), WeightVersion());
  EXPECT_EQ(table.serving, before);
  EXPECT_FALSE(gate.held);
}

TEST_P(UpdateInBothModes, RollbackOfACommitThatCannotBeGivenUpWaitsForIt) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  absl::Notification installing;
  std::thread commit([&] {
    EXPECT_TRUE(update
                    .Commit({0, 1},
                            [&](const auto& given_up) {
                              installing.Notify();
                              (void)WaitUntilGivenUp(given_up);  // the Rollback has come: too late
                              table.Install();
                              return absl::OkStatus();
                            })
                    .ok());
  });
  installing.WaitForNotification();
  EXPECT_FALSE(update.Rollback({0, 1}).value());
  EXPECT_EQ(update.serving(), (WeightVersion{0, 1}));
  commit.join();
  EXPECT_EQ(table.serving[0], Values(1, 0));
}

// Random calls against the state machine written down a second time, as plainly as it can be.
TEST_P(UpdateInBothModes, RandomCallsFollowTheModel) {
  enum State { kServing, kReceiving, kVerified };
  struct Model {
    State state = kServing;
    int64_t serving = 0, open = -1;
    bool sent[2] = {};
  } model;
  std::mt19937 random(7);
  int commits = 0;
  for (int call = 0; call < 20000; ++call) {
    const int64_t step = model.serving + static_cast<int64_t>(random() % 3);
    const bool is_open = model.state != kServing && model.open == step;
    absl::StatusCode want = absl::StatusCode::kOk, got = absl::StatusCode::kOk;
    switch (random() % 6) {
      case 0:
        if (step <= model.serving || (model.state != kServing && !is_open)) {
          want = absl::StatusCode::kFailedPrecondition;
        } else if (model.state == kServing) {
          model.state = kReceiving;
          model.open = step;
          model.sent[0] = model.sent[1] = false;
        }
        got = update.Begin({0, step}, Whole(), absl::Minutes(1)).status().code();
        break;
      case 1:
      case 2: {
        const int tensor = static_cast<int>(random() % 2);
        want = is_open ? absl::StatusCode::kOk : absl::StatusCode::kNotFound;
        if (want == absl::StatusCode::kOk) model.sent[tensor] = true;
        got = Send(step, tensor).code();
        break;
      }
      case 3: {
        const bool corrupt = random() % 4 == 0;
        const bool again = is_open && model.state == kVerified;
        std::vector<uint64_t> digests = Digests(step);
        if (corrupt) digests[0] ^= 1u << random() % 32;
        want = !is_open                           ? absl::StatusCode::kNotFound
               : !model.sent[0] || !model.sent[1] ? absl::StatusCode::kFailedPrecondition
               : corrupt                          ? absl::StatusCode::kDataLoss
                                                  : absl::StatusCode::kOk;
        if (want == absl::StatusCode::kOk && !again) model.state = kVerified;
        if (want == absl::StatusCode::kDataLoss) model.state = kServing;
        got = update.Verify({0, step}, digests).code();
        break;
      }
      case 4:
        want = step == model.serving      ? absl::StatusCode::kOk
               : !is_open                 ? absl::StatusCode::kNotFound
               : model.state != kVerified ? absl::StatusCode::kFailedPrecondition
                                          : absl::StatusCode::kOk;
        if (is_open && want == absl::StatusCode::kOk) {
          model.serving = step;
          model.state = kServing;
          ++commits;
        }
        got = Commit(step).code();
        break;
      default:
        if (random() % 4 != 0) continue;
        if (is_open) model.state = kServing;
        ASSERT_EQ(update.Rollback({0, step}).value(), is_open);
    }
    ASSERT_EQ(got, want) << "call " << call;
    const UpdateStatus status = update.status();
    ASSERT_EQ(static_cast<int>(status.state), static_cast<int>(model.state));
    ASSERT_EQ(status.serving, (WeightVersion{0, model.serving}));
    const bool overwritten = GetParam() && model.state != kServing && (model.sent[0] || model.sent[1]);
    ASSERT_EQ(gate.held.load(), overwritten) << "call " << call;
    if (model.serving > 0 && !overwritten) {
      ASSERT_EQ(table.serving[0], Values(model.serving, 0)) << "only a commit changes what steps see";
      ASSERT_EQ(table.serving[1], Values(model.serving, 1));
    }
  }
  EXPECT_GT(commits, 80);
}

class DirectTest : public UpdateTest {
 protected:
  DirectTest() : UpdateTest(true) {}
  void Commit1() {
    Receive(1);
    ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
    ASSERT_TRUE(Commit(1).ok());
  }
  // Until it is `state`, 10 s at most.
  bool Becomes(UpdateState state) {
    const absl::Time deadline = absl::Now() + absl::Seconds(10);
    while (update.status().state != state && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    return update.status().state == state;
  }
};

TEST_F(DirectTest, StepsStandFromTheFirstWholeTensorToTheCommit) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  const std::vector<std::byte> bytes = Bytes(Values(1, 0));
  ASSERT_TRUE(update.Push({0, 1}, 0, 0, std::span(bytes).first(8)).ok());
  EXPECT_FALSE(gate.held) << "nothing is overwritten yet";
  ASSERT_TRUE(Send(1, 0).ok());
  EXPECT_TRUE(gate.held);
  ASSERT_TRUE(Send(1, 1).ok());
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(gate.held);
  ASSERT_TRUE(Commit(1).ok());
  EXPECT_FALSE(gate.held);
}

TEST_F(DirectTest, WhatFailsToHoldIsSentAgain) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  gate.hold_status = absl::UnavailableError("stopping");
  EXPECT_TRUE(absl::IsUnavailable(Send(1, 0)));
  EXPECT_EQ(update.status().received_bytes, 0);
  gate.hold_status = absl::OkStatus();
  ASSERT_TRUE(Send(1, 0).ok());
}

TEST_F(DirectTest, WhateverDropsTheUpdateBringsTheOldVersionBack) {
  Commit1();
  const auto begin = [&](absl::Duration lease) {
    const auto begun = update.Begin({0, 2}, Whole(), lease);
    return begun.ok() && Send(2, 0).ok();
  };
  const auto restored = [&] {
    return !gate.held && table.serving[0] == Values(1, 0) && table.serving[1] == Values(1, 1);
  };
  ASSERT_TRUE(begin(absl::Minutes(1)));
  EXPECT_NE(table.serving[0], Values(1, 0));
  EXPECT_TRUE(update.Rollback({0, 2}).value());
  EXPECT_TRUE(restored());

  ASSERT_TRUE(begin(absl::Minutes(1)));
  ASSERT_TRUE(Send(2, 1).ok());
  EXPECT_TRUE(absl::IsDataLoss(update.Verify({0, 2}, std::vector<uint64_t>{1, 2})));
  EXPECT_TRUE(restored());

  ASSERT_TRUE(begin(absl::Minutes(1)));
  table.stage_status = absl::InternalError("the device");
  EXPECT_TRUE(absl::IsInternal(Send(2, 1)));
  table.stage_status = absl::OkStatus();
  ASSERT_TRUE(Becomes(UpdateState::kServing));
  EXPECT_TRUE(restored());

  ASSERT_TRUE(begin(absl::Milliseconds(20)));
  ASSERT_TRUE(Becomes(UpdateState::kServing));
  EXPECT_TRUE(restored());

  ASSERT_TRUE(begin(absl::Minutes(1)));
  ASSERT_TRUE(Send(2, 1).ok());
  ASSERT_TRUE(update.Verify({0, 2}, Digests(2)).ok());
  ASSERT_TRUE(Commit(2).ok());
  EXPECT_EQ(table.serving[0], Values(2, 0));
}

TEST_F(DirectTest, BeginWaitsForTheShadowAndSaysHowFarItIs) {
  table.fake_shadow().blocked = true;
  Commit1();
  EXPECT_EQ(update.status().shadow.total, 40);
  const absl::Status late =
      update.Begin({0, 2}, Whole(), absl::Minutes(1), {.deadline = absl::Now() + absl::Milliseconds(20)}).status();
  EXPECT_TRUE(absl::IsUnavailable(late));
  EXPECT_TRUE(absl::StrContains(late.message(), "still being written, 3 of 40 bytes")) << late;
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Begin({0, 1}, Whole(), absl::Minutes(1)).status())) << "at once";
  absl::Status begun;
  std::thread waiting([&] { begun = update.Begin({0, 2}, Whole(), absl::Minutes(1)).status(); });
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  table.fake_shadow().blocked = false;
  waiting.join();
  ASSERT_TRUE(begun.ok()) << begun;
  EXPECT_EQ(table.fake_shadow().copy[0], Values(1, 0));
  EXPECT_EQ(update.status().shadow.total, 0);
}

TEST_F(DirectTest, ABeginWhoseClientIsGoneOpensNothing) {
  table.fake_shadow().blocked = true;
  Commit1();
  int asked = 0;  // three times before it waits for the shadow
  const CallLimit limit = {.cancelled = [&] { return ++asked > 3; }};
  EXPECT_TRUE(absl::IsCancelled(update.Begin({0, 2}, Whole(), absl::Minutes(1), limit).status()));
  table.fake_shadow().blocked = false;
  ASSERT_TRUE(update.Begin({1, 0}, Whole(), absl::Minutes(1)).ok()) << "of another version";
}

TEST_F(DirectTest, RestoringShowsAndNothingBeginsMeanwhile) {
  Receive(1);
  table.fake_shadow().blocked = true;
  absl::StatusOr<bool> dropped;
  std::thread rollback([&] { dropped = update.Rollback({0, 1}); });
  ASSERT_TRUE(Becomes(UpdateState::kRestoring));
  EXPECT_EQ(update.status().open, (WeightVersion{0, 1}));
  EXPECT_TRUE(gate.held);
  EXPECT_TRUE(absl::IsUnavailable(
      update.Begin({0, 2}, Whole(), absl::Minutes(1), {.deadline = absl::Now() + absl::Milliseconds(10)}).status()));
  EXPECT_TRUE(absl::IsNotFound(Send(1, 0)));
  table.fake_shadow().blocked = false;
  rollback.join();
  EXPECT_TRUE(dropped.value());
  EXPECT_FALSE(gate.held);
}

TEST_F(DirectTest, AReceiveThatWasDroppedEndsBeforeAnythingIsRestored) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  ASSERT_TRUE(update.BeginReceive({0, 1}, {}, {.deadline = absl::Now()}).ok());
  EXPECT_FALSE(gate.held);
  ASSERT_TRUE(update.BeforeStaging({0, 1}).ok());
  EXPECT_TRUE(gate.held);
  table.serving[0] = Values(1, 0);
  absl::StatusOr<bool> dropped;
  std::thread rollback([&] { dropped = update.Rollback({0, 1}); });
  ASSERT_TRUE(Becomes(UpdateState::kRestoring));
  EXPECT_TRUE(absl::IsNotFound(update.BeforeStaging({0, 1})));
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(update.status().state, UpdateState::kRestoring);
  EXPECT_FALSE(update.EndReceive({0, 1}, absl::CancelledError("")).ok());
  rollback.join();
  EXPECT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_EQ(table.serving[0], std::vector<float>(4));
}

// It may end as late as its deadline says; what it overwrote can be restored then as well.
TEST_F(DirectTest, ADroppedReceiveMayTakeAsLongAsItsCall) {
  for (const bool ends : {true, false}) {
    FakeGate own_gate;
    FakeTable own_table(&own_gate);
    WeightUpdate own(&own_table, {}, &own_gate, /*dropped_receive_wait=*/absl::Milliseconds(1));
    ASSERT_TRUE(own.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
    const absl::Duration left = ends ? absl::Minutes(10) : absl::ZeroDuration();
    ASSERT_TRUE(own.BeginReceive({0, 1}, {}, {.deadline = absl::Now() + left}).ok());
    ASSERT_TRUE(own.BeforeStaging({0, 1}).ok());
    absl::StatusOr<bool> dropped;
    std::thread rollback([&] { dropped = own.Rollback({0, 1}); });
    if (ends) {
      while (own.status().state != UpdateState::kRestoring) absl::SleepFor(absl::Milliseconds(1));
      absl::SleepFor(absl::Milliseconds(50));
      EXPECT_FALSE(own.EndReceive({0, 1}, absl::CancelledError("")).ok());
    }
    rollback.join();
    EXPECT_EQ(dropped.ok(), ends) << dropped.status();
    EXPECT_EQ(own_gate.failure().ok(), ends) << own_gate.failure();
  }
}

TEST_F(DirectTest, WhatCannotBeRestoredNeverServes) {
  Receive(1);
  table.fake_shadow().restore_status = absl::DataLossError("a: digest");
  EXPECT_TRUE(absl::IsInternal(update.Rollback({0, 1}).status()));
  EXPECT_TRUE(gate.held);
  EXPECT_TRUE(absl::StrContains(gate.failure().message(), "could not be restored: a: digest")) << gate.failure();
  EXPECT_TRUE(absl::IsInternal(update.Begin({0, 2}, Whole(), absl::Minutes(1)).status()));
}

class ReceiveTest : public UpdateTest {
 protected:
  absl::StatusOr<lockstep::Receive> BeginReceive(int64_t step, std::vector<int64_t> tensors = {},
                                                 absl::Duration wait = absl::ZeroDuration()) {
    return update.BeginReceive({0, step}, std::move(tensors), {.deadline = absl::Now() + wait});
  }
  absl::Status EndReceive(int64_t step, const absl::Status& arrived = absl::OkStatus()) {
    return update.EndReceive({0, step}, arrived);
  }
  // As the inbox counts the tensors of a version.
  void Arrive(int64_t step) {
    table.fake_inbox().arrived = {{.digest = Digests(step)[0]}, {.digest = Digests(step)[1]}};
  }
};

TEST_F(ReceiveTest, WholeVersions) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  const auto receive = BeginReceive(1);
  ASSERT_TRUE(receive.ok()) << receive.status();
  EXPECT_EQ(receive->tensors, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(receive->bytes, (std::vector<int64_t>{16, 24}));
  ASSERT_EQ(table.fake_inbox().expected.size(), 2u);
  EXPECT_EQ(table.fake_inbox().expected[1].rows, 2);
  ASSERT_TRUE(update.NoteProgress({0, 1}, 7).ok());
  EXPECT_EQ(update.status().received_bytes, 7);
  Arrive(1);
  ASSERT_TRUE(EndReceive(1).ok());
  EXPECT_EQ(update.status().received_bytes, 40);
  EXPECT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  // Sent again, by a learner that was restarted.
  ASSERT_TRUE(BeginReceive(1).ok());
  EXPECT_EQ(update.status().state, UpdateState::kReceiving);
  EXPECT_TRUE(absl::IsFailedPrecondition(Commit(1)));
  Arrive(1);
  ASSERT_TRUE(EndReceive(1).ok());
  EXPECT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(Commit(1).ok());
}

TEST_F(ReceiveTest, OneTensorByEachWay) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  ASSERT_TRUE(BeginReceive(1, {1}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(Send(1, 0)));  // while a receive is under way
  table.fake_inbox().arrived = {{.digest = Digests(1)[1]}};
  ASSERT_TRUE(EndReceive(1).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Verify({0, 1}, Digests(1))));
  ASSERT_TRUE(Send(1, 0).ok());
  EXPECT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
}

TEST_F(ReceiveTest, AFailedOneCountsForNothingAndMayBeTriedAgain) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  ASSERT_TRUE(BeginReceive(1).ok());
  Arrive(1);
  EXPECT_TRUE(absl::IsUnavailable(EndReceive(1, absl::UnavailableError("a rank is gone"))));
  EXPECT_EQ(update.status().received_bytes, 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Verify({0, 1}, Digests(1))));
  // Nor does what an earlier one had brought.
  ASSERT_TRUE(BeginReceive(1).ok());
  ASSERT_TRUE(EndReceive(1).ok());
  ASSERT_TRUE(BeginReceive(1).ok());
  EXPECT_FALSE(EndReceive(1, absl::CancelledError("")).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(update.Verify({0, 1}, Digests(1))));
}

TEST_F(ReceiveTest, WrongDigestsAndValues) {
  for (const ArrivedTensor& bad : {ArrivedTensor{.digest = 1}, ArrivedTensor{Digests(1)[1], /*non_finite=*/3}}) {
    ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
    ASSERT_TRUE(BeginReceive(1).ok());
    Arrive(1);
    table.fake_inbox().arrived[1] = bad;
    ASSERT_TRUE(EndReceive(1).ok());
    const absl::Status status = update.Verify({0, 1}, Digests(1));
    EXPECT_TRUE(absl::IsDataLoss(status));
    EXPECT_TRUE(absl::StrContains(status.message(), "b (")) << status;
  }
}

TEST_F(ReceiveTest, OneAtATime) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  ASSERT_TRUE(BeginReceive(1).ok());
  EXPECT_TRUE(absl::IsUnavailable(BeginReceive(1, {}, absl::Milliseconds(20)).status()));
  absl::StatusOr<lockstep::Receive> second;
  std::thread waiting([&] { second = BeginReceive(1, {}, absl::Seconds(20)); });
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_FALSE(EndReceive(1, absl::CancelledError("")).ok());
  waiting.join();
  EXPECT_TRUE(second.ok()) << second.status();
}

TEST_F(ReceiveTest, OneThatIsRefusedForgetsNothing) {
  Receive(1);
  ASSERT_TRUE(update.Verify({0, 1}, Digests(1)).ok());
  EXPECT_TRUE(absl::IsAborted(
      update.BeginReceive({0, 1}, {}, {.deadline = absl::Now()}, [] { return absl::AbortedError("the group"); })
          .status()));
  EXPECT_TRUE(absl::IsCancelled(update.BeginReceive({0, 1}, {}, {.cancelled = [] { return true; }}).status()));
  EXPECT_EQ(update.status().state, UpdateState::kVerified);
  EXPECT_EQ(update.status().received_bytes, 40);
  EXPECT_TRUE(table.fake_inbox().expected.empty());
  EXPECT_TRUE(Commit(1).ok());
}

TEST_F(ReceiveTest, OneWhoseSenderIsGoneWaitsNoLonger) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  ASSERT_TRUE(BeginReceive(1).ok());
  std::atomic<bool> gone = false;
  absl::Status second;
  std::thread waiting([&] {
    second = update.BeginReceive({0, 1}, {}, {.cancelled = [&] { return gone.load(); }}).status();
  });
  gone = true;
  waiting.join();
  EXPECT_TRUE(absl::IsCancelled(second)) << second;
  Arrive(1);
  ASSERT_TRUE(EndReceive(1).ok());
  EXPECT_TRUE(update.Verify({0, 1}, Digests(1)).ok()) << "the first goes on";
}

// What is still being written into the stage must not meet the next update's.
TEST_F(ReceiveTest, ADroppedUpdatesReceiveEndsBeforeTheNextBegins) {
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  const auto receive = BeginReceive(1);
  ASSERT_TRUE(receive.ok());
  EXPECT_FALSE(*receive->dropped);
  ASSERT_TRUE(update.Rollback({0, 1}).ok());
  EXPECT_TRUE(*receive->dropped);
  EXPECT_TRUE(absl::IsNotFound(update.NoteProgress({0, 1}, 1)));
  absl::Status begun;
  std::thread next([&] { begun = update.Begin({0, 2}, Whole(), absl::Minutes(1)).status(); });
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(update.status().state, UpdateState::kServing);
  EXPECT_TRUE(absl::IsNotFound(EndReceive(1)));  // had it arrived: too late
  next.join();
  EXPECT_TRUE(begun.ok()) << begun;
  EXPECT_EQ(update.status().received_bytes, 0);
}

TEST_F(ReceiveTest, BadInput) {
  EXPECT_TRUE(absl::IsNotFound(BeginReceive(1).status()));
  ASSERT_TRUE(update.Begin({0, 1}, Whole(), absl::Minutes(1)).ok());
  for (const std::vector<int64_t>& tensors : {std::vector<int64_t>{-1}, {2}, {1, 0}, {1, 1}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(BeginReceive(1, tensors).status()));
  }
  table.fake_inbox().open_status = absl::InvalidArgumentError("not this way");
  EXPECT_TRUE(absl::IsInvalidArgument(BeginReceive(1).status()));
  table.fake_inbox().open_status = absl::OkStatus();
  EXPECT_TRUE(BeginReceive(1).ok());  // none of them left the inbox taken
  EXPECT_TRUE(EndReceive(1).ok());
  table.has_inbox = false;
  EXPECT_TRUE(absl::IsUnimplemented(BeginReceive(1).status()));
}

}  // namespace
}  // namespace lockstep

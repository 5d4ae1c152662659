#include "rollout/server/request_registry.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using DetachReason = RequestState::DetachReason;

// Notes aborts and ends requests when told to.
class NoteWorker final : public WorkerInterface {
 public:
  absl::Status Submit(RequestSpec, std::shared_ptr<RequestSink>) override { return absl::OkStatus(); }
  void Abort(const std::string& request_id, std::optional<int32_t>, AbortReason reason) override {
    aborts[request_id] = reason;
  }
  WorkerLoad Load() const override { return {}; }
  absl::Status Health() const override { return absl::OkStatus(); }
  WeightVersion weight_version() const override { return {}; }
  void Drain(absl::Time) override {}
  std::map<std::string, AbortReason> aborts;
};

class IdleReader final : public Reader {
 public:
  void Pump() override {}
};

// Takes what there is whenever it is pumped.
class KeenReader final : public Reader {
 public:
  void Pump() override {
    ResultPiece piece;
    StreamEnd end;
    while (state->NextPiece(this, &piece, &end) == RequestState::Next::kPiece) {
    }
  }
  RequestState* state = nullptr;
};

constexpr int64_t kTokenBytes = 8;

class RequestRegistryTest : public ::testing::Test {
 protected:
  // The task thread is stopped, so that only the test reclaims and expires.
  RequestRegistryTest() { tasks_.Stop(); }

  std::shared_ptr<RequestState> Start(const std::string& id, bool detach = false) {
    RequestInfo info;
    info.request_id = id;
    info.detach_on_disconnect = detach;
    info.layout = {.raw = true, .temperature = false, .processed = false, .top_k = 0, .kept = false, .vocab_size = 100};
    auto state = registry_.Add(std::move(info));
    EXPECT_TRUE(state.ok()) << state.status();
    readers_[id] = std::make_shared<IdleReader>();
    EXPECT_TRUE((*state)->Attach(readers_[id], 1, {}).ok());
    EXPECT_TRUE((*state)->BeginSubmit());
    (*state)->EndSubmit();
    return *state;
  }

  static void Tokens(RequestState& state, int64_t offset, int64_t count) {
    SampleTokens tokens{.sample = 0,
                        .offset = offset,
                        .tokens = std::vector<int32_t>(count),
                        .logprobs = std::vector<RowLogprobs>(count)};
    state.OnTokens(std::move(tokens));
  }

  void Deliver(RequestState& state) {
    ResultPiece piece;
    StreamEnd end;
    while (state.NextPiece(readers_[state.info().request_id].get(), &piece, &end) == RequestState::Next::kPiece) {
    }
  }

  // A request that ended, with its stream closed.
  std::shared_ptr<RequestState> Finished(const std::string& id, int64_t tokens, bool delivered) {
    auto state = Start(id);
    Tokens(*state, 0, tokens);
    state->OnSampleDone(0, {});
    if (delivered) Deliver(*state);
    registry_.Detach(*state, readers_[id].get(), DetachReason::kStreamEnded);
    return state;
  }

  TaskThread tasks_;
  NoteWorker worker_;
  RequestRegistry registry_{&worker_,
                            {.max_buffered_bytes = 1000 * kTokenBytes,
                             .max_retained_bytes = 1000 * kTokenBytes,
                             .reattach = absl::Seconds(60)},
                            &tasks_};
  std::map<std::string, std::shared_ptr<IdleReader>> readers_;
};

TEST_F(RequestRegistryTest, AnIdIsTakenWhileInFlightOrRead) {
  auto first = Start("a");
  const auto add = [this] {
    RequestInfo info;
    info.request_id = "a";
    return registry_.Add(std::move(info)).status().code();
  };
  EXPECT_EQ(add(), absl::StatusCode::kAlreadyExists);
  first->OnSampleDone(0, {});
  EXPECT_EQ(add(), absl::StatusCode::kAlreadyExists) << "its stream is still open";
  registry_.Detach(*first, readers_["a"].get(), DetachReason::kStreamEnded);
  EXPECT_EQ(registry_.Find("a"), first) << "kept for re-attaching";
  auto second = Start("a");
  EXPECT_EQ(registry_.Find("a"), second);
  EXPECT_NE(first->info().worker_id, second->info().worker_id);
  registry_.Forget(*first);
  EXPECT_EQ(registry_.Find("a"), second) << "forgetting the old one does not touch the new one";
}

TEST_F(RequestRegistryTest, CancelledRequestsAreAbortedAndForgotten) {
  auto state = Start("a");
  Tokens(*state, 0, 10);
  registry_.Detach(*state, readers_["a"].get(), DetachReason::kDisconnected);
  EXPECT_EQ(worker_.aborts.at(state->info().worker_id), AbortReason::kCancelled);
  EXPECT_EQ(registry_.Find("a"), nullptr);
  EXPECT_EQ(registry_.buffered_bytes() + registry_.retained_bytes(), 0);
}

TEST_F(RequestRegistryTest, CutsTheLargestUntilTheBudgetHolds) {
  std::map<std::string, std::shared_ptr<RequestState>> states;
  for (const char* id : {"small", "large", "middle"}) states[id] = Start(id);
  Tokens(*states["small"], 0, 100);
  Tokens(*states["large"], 0, 700);
  Tokens(*states["middle"], 0, 400);
  registry_.Reclaim();
  EXPECT_EQ(registry_.buffered_bytes(), 500 * kTokenBytes);
  ASSERT_EQ(worker_.aborts.size(), 1);
  EXPECT_EQ(worker_.aborts.at(states["large"]->info().worker_id), AbortReason::kBufferLimit);
  EXPECT_EQ(registry_.retained_bytes(), 700 * kTokenBytes) << "and keeps what it has";
  EXPECT_EQ(registry_.Find("large"), states["large"]);
}

TEST_F(RequestRegistryTest, SendsToReadersThatAreReadyBeforeItCuts) {
  auto keen = Start("keen");
  const auto reader = std::make_shared<KeenReader>();
  reader->state = keen.get();
  ASSERT_TRUE(keen->Attach(reader, /*stream_interval=*/0, {}).ok());
  auto slow = Start("slow");
  Tokens(*keen, 0, 700);
  Tokens(*slow, 0, 400);
  registry_.Reclaim();
  EXPECT_TRUE(worker_.aborts.empty());
  EXPECT_EQ(registry_.buffered_bytes(), 400 * kTokenBytes) << "the slow one's";
  Tokens(*slow, 400, 601);
  registry_.Reclaim();
  EXPECT_EQ(worker_.aborts.size(), 1);
  EXPECT_EQ(worker_.aborts.count(slow->info().worker_id), 1);
}

TEST_F(RequestRegistryTest, RefusesNewRequestsOverBudget) {
  auto state = Start("a");
  Tokens(*state, 0, 1001);
  RequestInfo info;
  info.request_id = "b";
  EXPECT_EQ(registry_.Add(std::move(info)).status().code(), absl::StatusCode::kResourceExhausted);
  registry_.Reclaim();
  Start("b");
}

TEST_F(RequestRegistryTest, DropsDeliveredBeforeUndeliveredAndOldBeforeNew) {
  Finished("undelivered", 300, /*delivered=*/false);
  absl::SleepFor(absl::Milliseconds(2));
  Finished("old", 300, /*delivered=*/true);
  absl::SleepFor(absl::Milliseconds(2));
  Finished("new", 300, /*delivered=*/true);
  registry_.Reclaim();
  EXPECT_EQ(registry_.size(), 3) << "within the budget nothing is dropped";
  auto last = Finished("last", 200, /*delivered=*/true);
  registry_.Reclaim();
  EXPECT_EQ(registry_.Find("old"), nullptr);
  EXPECT_NE(registry_.Find("undelivered"), nullptr);
  EXPECT_NE(registry_.Find("new"), nullptr);
  EXPECT_EQ(registry_.Find("last"), last);
  EXPECT_LE(registry_.retained_bytes(), 1000 * kTokenBytes);
}

TEST_F(RequestRegistryTest, TrimsRunningRequestsBeforeDroppingWhatNobodyHasRead) {
  Finished("undelivered", 300, /*delivered=*/false);
  auto running = Start("running");
  Tokens(*running, 0, 800);
  Deliver(*running);
  EXPECT_GT(registry_.retained_bytes(), 1000 * kTokenBytes);
  registry_.Reclaim();
  EXPECT_NE(registry_.Find("undelivered"), nullptr);
  EXPECT_EQ(registry_.retained_bytes(), 300 * kTokenBytes);
  EXPECT_TRUE(worker_.aborts.empty());
}

TEST_F(RequestRegistryTest, DetachedRunningRequestsGoLast) {
  auto detached = Start("detached", /*detach=*/true);
  Tokens(*detached, 0, 1100);
  registry_.Detach(*detached, readers_["detached"].get(), DetachReason::kDisconnected);
  EXPECT_TRUE(worker_.aborts.empty());
  registry_.Reclaim();
  EXPECT_EQ(worker_.aborts.at(detached->info().worker_id), AbortReason::kBufferLimit);
  EXPECT_EQ(registry_.Find("detached"), nullptr);
  EXPECT_EQ(registry_.retained_bytes(), 0);
}

TEST_F(RequestRegistryTest, EndsWhatIsDue) {
  const absl::Time now = absl::Now();
  auto due = Start("due");
  auto later = Start("later");
  Start("never");
  ASSERT_TRUE(due->Attach(readers_["due"], 1, {}, now).ok());
  ASSERT_TRUE(later->Attach(readers_["later"], 1, {}, now + absl::Seconds(1)).ok());
  registry_.EndDue(now);
  ASSERT_EQ(worker_.aborts.size(), 1);
  EXPECT_EQ(worker_.aborts.at(due->info().worker_id), AbortReason::kDeadline);
  worker_.aborts.clear();
  registry_.EndDue(now + absl::Seconds(2));
  EXPECT_EQ(worker_.aborts.size(), 1) << "each once";
  EXPECT_EQ(worker_.aborts.count(later->info().worker_id), 1);
}

TEST_F(RequestRegistryTest, ExpiresWhatNobodyCameBackFor) {
  Finished("a", 10, true);
  auto running = Start("b");
  registry_.Expire(absl::Now() + absl::Seconds(59));
  EXPECT_EQ(registry_.size(), 2);
  registry_.Expire(absl::Now() + absl::Seconds(61));
  EXPECT_EQ(registry_.Find("a"), nullptr);
  EXPECT_EQ(registry_.Find("b"), running) << "in flight, however long it takes";
}

}  // namespace
}  // namespace lockstep

#include "rollout/server/request_starter.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using Next = RequestState::Next;

// Notes what it gets.
class NoteWorker final : public WorkerInterface {
 public:
  absl::Status Submit(RequestSpec spec, std::shared_ptr<RequestSink>) override {
    submitted.push_back(spec.request_id);
    return absl::OkStatus();
  }
  void Abort(const std::string&, std::optional<int32_t>, AbortReason) override {}
  WorkerLoad Load() const override { return {}; }
  absl::Status Health() const override { return absl::OkStatus(); }
  WeightVersion weight_version() const override { return {}; }
  void Drain(absl::Time) override {}
  std::vector<std::string> submitted;
};

class IdleReader final : public Reader {
 public:
  void Pump() override {}
};

class RequestStarterTest : public ::testing::Test {
 protected:
  // The task thread is stopped: who waits for a version waits for good.
  RequestStarterTest() { tasks_.Stop(); }

  std::shared_ptr<RequestState> Add(const std::string& id) {
    RequestInfo info;
    info.request_id = id;
    auto state = registry_.Add(std::move(info));
    EXPECT_TRUE(state.ok()) << state.status();
    return *state;
  }

  absl::Status Start(const std::shared_ptr<RequestState>& state, std::optional<WeightVersion> min_version = {}) {
    RequestSpec spec;
    spec.request_id = state->info().worker_id;
    return starter_.Start(std::move(spec), state, reader_, /*stream_interval=*/1, absl::InfiniteFuture(), min_version,
                          absl::Now());
  }

  Next Step(RequestState& state) { return state.NextPiece(reader_.get(), &piece_, &end_); }

  TaskThread tasks_;
  NoteWorker worker_;
  RequestRegistry registry_{
      &worker_, {.max_buffered_bytes = 1000, .max_retained_bytes = 1000, .reattach = absl::Seconds(60)}, &tasks_};
  RequestStarter starter_{&worker_, &registry_, &tasks_, absl::Seconds(60), /*max_waiting=*/1};
  std::shared_ptr<IdleReader> reader_ = std::make_shared<IdleReader>();
  ResultPiece piece_;
  StreamEnd end_;
};

TEST_F(RequestStarterTest, AnAbortedAndReplacedRequestIsNotStarted) {
  const auto first = Add("a");
  EXPECT_TRUE(registry_.Abort(*first, std::nullopt, AbortReason::kClient));
  const auto second = Add("a");
  EXPECT_EQ(Start(first).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(worker_.submitted.empty());
  EXPECT_TRUE(Start(second).ok());
  EXPECT_EQ(worker_.submitted, std::vector<std::string>{second->info().worker_id});
}

TEST_F(RequestStarterTest, AcceptsWhatWaitsAndNotWhatCannot) {
  const WeightVersion later{.epoch = 0, .step = 1};
  const auto waits = Add("waits");
  EXPECT_TRUE(Start(waits, later).ok());
  EXPECT_EQ(starter_.waiting(), 1);
  ASSERT_EQ(Step(*waits), Next::kPiece);
  EXPECT_TRUE(piece_.accepted);
  const auto refused = Add("refused");
  EXPECT_TRUE(Start(refused, later).ok());
  ASSERT_EQ(Step(*refused), Next::kEnd) << "one too many wait";
  EXPECT_EQ(end_.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(worker_.submitted.empty());
}

}  // namespace
}  // namespace lockstep

// The worker's thread and queue: limits, idle waits, aborts and drains.
#include "rollout/worker/worker.h"

#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/testing/failing_backend.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

constexpr auto kNever = [] { return false; };

// Counts samples as they end.
class CountingSink : public RequestSink {
 public:
  explicit CountingSink(int32_t samples) : left_(samples) {}
  void OnPromptLogprobs(PromptLogprobs) override {}
  void OnTokens(SampleTokens tokens) override {
    absl::MutexLock lock(&mutex_);
    tokens_ += static_cast<int64_t>(tokens.tokens.size());
  }
  void OnSampleDone(int32_t, SampleResult result) override {
    absl::MutexLock lock(&mutex_);
    result_ = std::move(result);
    --left_;
  }

  bool WaitUntilDone(absl::Duration timeout = absl::Seconds(60)) {
    absl::MutexLock lock(&mutex_);
    const auto done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return left_ == 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&done), timeout);
  }
  bool WaitForTokens(absl::Duration timeout = absl::Seconds(60)) {
    absl::MutexLock lock(&mutex_);
    const auto some = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return tokens_ > 0; };
    return mutex_.AwaitWithTimeout(absl::Condition(&some), timeout);
  }
  SampleResult result() const {
    absl::MutexLock lock(&mutex_);
    return result_;
  }

 private:
  mutable absl::Mutex mutex_;
  int32_t left_ ABSL_GUARDED_BY(mutex_);
  int64_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  SampleResult result_ ABSL_GUARDED_BY(mutex_);
};

class WorkerTest : public testing::Test {
 protected:
  // `failing_after`: steps until the device fails; nullopt: never.
  void Start(int64_t max_waiting = 100, std::optional<int> failing_after = std::nullopt) {
    auto model = std::shared_ptr<LocalModel>(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1));
    if (failing_after) {
      model->backend = MakeFailingBackend(model->ops().profile(), model->threads.get(), *failing_after);
    }
    Start(std::move(model), max_waiting);
  }

  void Start(std::shared_ptr<LocalModel> model, int64_t max_waiting,
             absl::Duration step_timeout = absl::InfiniteDuration()) {
    auto local = MakeLocalLoop(*model, {.max_sequences = 2, .max_kv_tokens = 8192});
    ASSERT_TRUE(local.ok()) << local.status();
    struct Owned {
      std::shared_ptr<LocalModel> model;
      std::unique_ptr<Engine> engine;
    };
    auto owned = std::make_shared<Owned>();
    owned->model = model;
    owned->engine = std::move(local->engine);
    worker_ = std::make_unique<Worker>(std::move(local->loop), max_waiting, owned, step_timeout);
  }

  static RequestSpec Request(const std::string& id, int64_t max_tokens, int32_t n = 1) {
    RequestSpec r;
    r.request_id = id;
    r.prompt = {1, 2, 3};
    r.max_tokens = max_tokens;
    r.n = n;
    return r;
  }

  std::unique_ptr<Worker> worker_;
};

TEST_F(WorkerTest, AFailedDeviceRefusesWhatComesAfter) {
  Start(100, /*failing_after=*/2);
  EXPECT_TRUE(worker_->Health().ok());
  auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 50), sink).ok());
  ASSERT_TRUE(sink->WaitUntilDone());
  EXPECT_EQ(sink->result().finish, FinishKind::kAborted);
  // The loop's failure is published right after the step that failed.
  for (int i = 0; i < 1000 && worker_->Health().ok(); ++i) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(worker_->Health().message(), kDeviceFailure);
  EXPECT_EQ(worker_->Submit(Request("b", 5), std::make_shared<CountingSink>(1)).code(), absl::StatusCode::kUnavailable);
}

TEST_F(WorkerTest, MakesTheDeviceItsThreads) {
  auto model = std::shared_ptr<LocalModel>(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1));
  model->backend = MakeThreadBoundBackend(model->ops().profile(), model->threads.get());
  Start(std::move(model), 100);
  auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 5), sink).ok());
  ASSERT_TRUE(sink->WaitUntilDone());
  EXPECT_EQ(sink->result().finish, FinishKind::kLength);
  EXPECT_TRUE(worker_->Health().ok()) << worker_->Health();
}

TEST_F(WorkerTest, AStepThatDoesNotEndIsNoticed) {
  absl::Notification released;
  auto model = std::shared_ptr<LocalModel>(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1));
  model->backend = MakeBlockingBackend(model->ops().profile(), model->threads.get(), &released);
  Start(std::move(model), 100, /*step_timeout=*/absl::Milliseconds(200));
  absl::SleepFor(absl::Milliseconds(250));
  EXPECT_TRUE(worker_->Health().ok()) << "it has nothing to run";
  auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 5), sink).ok());
  for (int i = 0; i < 10000 && worker_->Health().ok(); ++i) absl::SleepFor(absl::Milliseconds(1));
  const absl::Status health = worker_->Health();
  released.Notify();
  EXPECT_TRUE(absl::IsDeadlineExceeded(health)) << health;
  EXPECT_NE(health.message().find("--step_timeout_seconds, 0.2"), std::string::npos) << health;
  EXPECT_TRUE(sink->WaitUntilDone());
}

TEST_F(WorkerTest, ACommitsCopyThatDoesNotEndIsNoticed) {
  auto model = std::shared_ptr<LocalModel>(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1));
  Start(std::move(model), 100, /*step_timeout=*/absl::Milliseconds(200));
  absl::Status health;
  const auto result = worker_->SwitchWeights({.version = {0, 1}}, [&] {
    for (int i = 0; i < 10000 && (health = worker_->Health()).ok(); ++i) absl::SleepFor(absl::Milliseconds(1));
    return absl::OkStatus();
  });
  EXPECT_TRUE(absl::IsDeadlineExceeded(health)) << health;
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(worker_->Health().ok()) << "it has ended after all";
}

TEST_F(WorkerTest, NothingWaitsForSamplesOfAPausedWorkerToFinish) {
  Start();
  const auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 8000), sink).ok());
  ASSERT_TRUE(sink->WaitForTokens());
  const auto in_an_hour = [] { return absl::Now() + absl::Hours(1); };
  ASSERT_TRUE(worker_->Pause(PauseMode::kKeep, in_an_hour(), kNever).ok());
  const auto again = worker_->Pause(PauseMode::kFinish, in_an_hour(), kNever);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(*again, 1);
  const WeightSwitch finish = {.version = {0, 1}, .policy = InFlightPolicy::kFinish, .finish_timeout = absl::Hours(1)};
  const auto result = worker_->SwitchWeights(finish, [] { return absl::OkStatus(); });
  EXPECT_TRUE(absl::IsDeadlineExceeded(result.status())) << result.status();
  worker_->Resume();
  worker_->Abort("a", std::nullopt, AbortReason::kClient);
  EXPECT_TRUE(sink->WaitUntilDone());
}

TEST_F(WorkerTest, AStepThatDoesNotEndIsNoticedWhileTheWorkerDrains) {
  absl::Notification released;
  auto model = std::shared_ptr<LocalModel>(MakeRandomModel(ModelKind::kHybrid, "fp32", 1, 1));
  model->backend = MakeBlockingBackend(model->ops().profile(), model->threads.get(), &released);
  Start(std::move(model), 100, /*step_timeout=*/absl::Milliseconds(200));
  auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 5), sink).ok());
  // Without an end: one that aborts the request before the worker's thread has begun with it would leave no step.
  std::thread drain([&] { worker_->Drain(absl::InfiniteFuture()); });
  for (int i = 0; i < 10000 && worker_->Health().ok(); ++i) absl::SleepFor(absl::Milliseconds(1));
  const absl::Status health = worker_->Health();
  released.Notify();
  drain.join();
  EXPECT_TRUE(absl::IsDeadlineExceeded(health)) << health;
}

TEST_F(WorkerTest, RunsWhatIsSubmittedFromManyThreads) {
  Start();
  std::vector<std::shared_ptr<CountingSink>> sinks(16);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < sinks.size(); ++i) {
    sinks[i] = std::make_shared<CountingSink>(2);
    threads.emplace_back([&, i] { EXPECT_TRUE(worker_->Submit(Request(absl::StrCat(i), 5, 2), sinks[i]).ok()); });
  }
  for (std::thread& t : threads) t.join();
  for (auto& sink : sinks) EXPECT_TRUE(sink->WaitUntilDone());
  worker_->Drain(absl::Now() + absl::Seconds(60));  // the load is that of the last step boundary
  EXPECT_EQ(worker_->Load().generated_tokens, 16 * 2 * 5);
}

TEST_F(WorkerTest, AFullQueueIsRefusedAndSaysSo) {
  Start(/*max_waiting=*/4);
  const auto running = std::make_shared<CountingSink>(2);
  ASSERT_TRUE(worker_->Submit(Request("running", 2000, 2), running).ok());
  while (worker_->Load().running_sequences < 2) absl::SleepFor(absl::Milliseconds(1));
  const auto waiting = std::make_shared<CountingSink>(4);
  ASSERT_TRUE(worker_->Submit(Request("waiting", 5, 4), waiting).ok());
  const absl::Status status = worker_->Submit(Request("refused", 5, 1), std::make_shared<CountingSink>(1));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  worker_->Abort("running", std::nullopt, AbortReason::kClient);
  EXPECT_TRUE(running->WaitUntilDone());
  EXPECT_TRUE(waiting->WaitUntilDone());
}

TEST_F(WorkerTest, AnIdleWorkerStillSeesDeadlines) {
  Start();
  const auto busy = std::make_shared<CountingSink>(1);
  RequestSpec request = Request("a", 4000);
  request.time_budget = absl::Milliseconds(50);
  ASSERT_TRUE(worker_->Submit(request, busy).ok());
  EXPECT_TRUE(busy->WaitUntilDone());
  EXPECT_EQ(busy->result().abort, AbortReason::kTimeBudget);
}

TEST_F(WorkerTest, DrainLetsWorkFinishAndRefusesNew) {
  Start();
  const auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 50), sink).ok());
  worker_->Drain(absl::Now() + absl::Seconds(60));
  EXPECT_TRUE(sink->WaitUntilDone(absl::ZeroDuration()));
  EXPECT_EQ(sink->result().finish, FinishKind::kLength);
  EXPECT_EQ(worker_->Submit(Request("b", 5), sink).code(), absl::StatusCode::kUnavailable);
}

TEST_F(WorkerTest, ADrainPastItsDeadlineAborts) {
  Start();
  const auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 8000), sink).ok());
  ASSERT_TRUE(sink->WaitForTokens());
  worker_->Drain(absl::Now());
  EXPECT_TRUE(sink->WaitUntilDone(absl::ZeroDuration()));
  EXPECT_EQ(sink->result().abort, AbortReason::kShutdown);
}

TEST_F(WorkerTest, HeldStepsStandUntilTheyAreReleasedOrTheWeightsSwitch) {
  Start();
  const auto install = [] { return absl::OkStatus(); };
  for (const bool released : {true, false}) {
    const auto sink = std::make_shared<CountingSink>(1);
    ASSERT_TRUE(worker_->Submit(Request(released ? "a" : "b", 2000), sink).ok());
    ASSERT_TRUE(sink->WaitForTokens());
    ASSERT_TRUE(worker_->HoldSteps().ok());
    worker_->Resume();  // of a client's pause
    const int64_t steps = worker_->Load().steps;
    EXPECT_FALSE(sink->WaitUntilDone(absl::Milliseconds(50)));
    EXPECT_EQ(worker_->Load().steps, steps);
    const WeightSwitch finish = {
        .version = {0, 1}, .policy = InFlightPolicy::kFinish, .finish_timeout = absl::Hours(1)};
    EXPECT_TRUE(absl::IsDeadlineExceeded(worker_->SwitchWeights(finish, install).status())) << "at once";
    EXPECT_EQ(worker_->Load().steps, steps);
    if (released) {
      worker_->ReleaseSteps();
    } else {
      const auto result = worker_->SwitchWeights({.version = {0, 1}}, install);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->recomputed, 1);
      EXPECT_GE(result->pause, absl::Milliseconds(50));
    }
    EXPECT_TRUE(sink->WaitUntilDone());
    EXPECT_EQ(sink->result().finish, FinishKind::kLength);
  }
}

TEST_F(WorkerTest, APauseDoesNotEndTheHoldOfACommitThatLetsSamplesFinish) {
  Start();
  const auto old = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("old", 8000), old).ok());
  ASSERT_TRUE(old->WaitForTokens());
  absl::StatusOr<WeightSwitchResult> result;
  std::thread commit([&] {
    result = worker_->SwitchWeights(
        {.version = {0, 1}, .policy = InFlightPolicy::kFinish, .finish_timeout = absl::Minutes(2)},
        [] { return absl::OkStatus(); });
  });
  absl::SleepFor(absl::Milliseconds(50));  // until it holds
  for (const PauseMode mode : {PauseMode::kFinish, PauseMode::kKeep}) {
    EXPECT_TRUE(worker_->Pause(mode, absl::Now(), kNever).ok());
    worker_->Resume();
  }
  const auto fresh = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("new", 5), fresh).ok());
  EXPECT_FALSE(fresh->WaitUntilDone(absl::Milliseconds(200))) << "it waits for the new version";
  worker_->Abort("old", std::nullopt, AbortReason::kClient);
  commit.join();
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_TRUE(fresh->WaitUntilDone());
  ASSERT_EQ(fresh->result().spans.size(), 1u);
  EXPECT_EQ(fresh->result().spans[0].weights, (WeightVersion{0, 1}));
}

TEST_F(WorkerTest, ACommitThatIsGivenUpChangesNothing) {
  Start();
  const auto old = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("old", 8000), old).ok());
  ASSERT_TRUE(old->WaitForTokens());
  const auto install = [] { return absl::InternalError("installed"); };
  for (const InFlightPolicy policy : {InFlightPolicy::kFinish, InFlightPolicy::kRecompute}) {
    std::atomic<int> asked = 0;
    const WeightSwitch change = {
        .version = {0, 1}, .policy = policy, .finish_timeout = absl::Hours(1), .given_up = [&] {
          return ++asked > (policy == InFlightPolicy::kFinish ? 1 : 0);
        }};
    EXPECT_TRUE(absl::IsCancelled(worker_->SwitchWeights(change, install).status()));
  }
  EXPECT_EQ(worker_->weight_version(), WeightVersion());
  const auto fresh = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("new", 5), fresh).ok());
  EXPECT_TRUE(fresh->WaitUntilDone()) << "held no longer";
  worker_->Abort("old", std::nullopt, AbortReason::kClient);
  EXPECT_TRUE(old->WaitUntilDone());
}

TEST_F(WorkerTest, ACommitDoesNotEndTheHoldOfAPauseThatLetsSamplesFinish) {
  Start();
  const auto old = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("old", 8000), old).ok());
  ASSERT_TRUE(old->WaitForTokens());
  std::thread pause([&] {
    const auto in_flight = worker_->Pause(PauseMode::kFinish, absl::Now() + absl::Minutes(2), kNever);
    EXPECT_TRUE(in_flight.ok() && *in_flight == 0) << in_flight.status();
  });
  absl::SleepFor(absl::Milliseconds(50));  // until it holds
  const WeightSwitch finish = {.version = {0, 1}, .policy = InFlightPolicy::kFinish};
  EXPECT_TRUE(absl::IsDeadlineExceeded(worker_->SwitchWeights(finish, [] { return absl::OkStatus(); }).status()));
  const auto fresh = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("new", 5), fresh).ok());
  EXPECT_FALSE(fresh->WaitUntilDone(absl::Milliseconds(200))) << "it waits for Resume";
  worker_->Abort("old", std::nullopt, AbortReason::kClient);
  pause.join();
  EXPECT_FALSE(fresh->WaitUntilDone(absl::Milliseconds(50)));
  worker_->Resume();
  EXPECT_TRUE(fresh->WaitUntilDone());
}

TEST_F(WorkerTest, APauseThatNobodyWaitsForHasNoEffect) {
  Start();
  const auto old = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("old", 8000), old).ok());
  ASSERT_TRUE(old->WaitForTokens());
  std::atomic<bool> gone = false;
  for (const bool resumed : {false, true}) {
    absl::StatusOr<int64_t> in_flight;
    std::atomic<bool> asked = false;
    std::thread pause([&] {
      in_flight = worker_->Pause(PauseMode::kFinish, absl::Now() + absl::Minutes(2), [&] {
        asked = true;
        return gone && !resumed;
      });
    });
    while (!asked) absl::SleepFor(absl::Milliseconds(1));  // it holds
    resumed ? worker_->Resume() : void(gone = true);
    pause.join();
    EXPECT_EQ(in_flight.status().code(), resumed ? absl::StatusCode::kAborted : absl::StatusCode::kCancelled);
    const auto fresh = std::make_shared<CountingSink>(1);
    ASSERT_TRUE(worker_->Submit(Request(resumed ? "b" : "a", 5), fresh).ok());
    EXPECT_TRUE(fresh->WaitUntilDone()) << "neither held nor paused";
  }
  EXPECT_TRUE(absl::IsCancelled(worker_->Pause(PauseMode::kKeep, absl::Now(), [] { return true; }).status()));
  worker_->Abort("old", std::nullopt, AbortReason::kClient);
  EXPECT_TRUE(old->WaitUntilDone());
}

TEST_F(WorkerTest, StepsThatFailWhileTheyAreHeldEndWhatIsInFlight) {
  Start();
  const auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 8000), sink).ok());
  ASSERT_TRUE(sink->WaitForTokens());
  ASSERT_TRUE(worker_->HoldSteps().ok());
  worker_->FailSteps(absl::DataLossError("not restored"));
  ASSERT_TRUE(sink->WaitUntilDone());
  EXPECT_EQ(sink->result().abort, AbortReason::kInternal);
  for (int i = 0; i < 1000 && worker_->Health().ok(); ++i) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(worker_->Health().message(), "not restored");
  EXPECT_FALSE(worker_->HoldSteps().ok());
}

TEST_F(WorkerTest, DestructionEndsWhatIsInFlight) {
  Start();
  const auto sink = std::make_shared<CountingSink>(1);
  ASSERT_TRUE(worker_->Submit(Request("a", 8000), sink).ok());
  worker_.reset();
  EXPECT_TRUE(sink->WaitUntilDone(absl::ZeroDuration()));
}

}  // namespace
}  // namespace lockstep

#include "rollout/worker/worker.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

// Not of the wall's clock, which may be set.
int64_t SteadyNanos() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Worker::Worker(std::unique_ptr<StepLoop> loop, int64_t max_waiting, std::shared_ptr<void> owned,
               absl::Duration step_timeout)
    : owned_(std::move(owned)), loop_(std::move(loop)), max_waiting_(max_waiting), step_timeout_(step_timeout) {
  load_ = loop_->Load();
  thread_ = std::thread([this] { Run(); });
}

Worker::~Worker() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  thread_.join();
}

absl::Status Worker::Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink) {
  LOCKSTEP_RETURN_IF_ERROR(loop_->CheckFits(spec));
  absl::MutexLock lock(&mutex_);
  if (!failure_.ok()) return absl::UnavailableError("this worker's device has failed; send the request to another");
  if (draining_ || stop_)
    return absl::UnavailableError("this worker is draining and takes no new requests; send it to another");
  const int64_t samples = std::max(spec.n, 1);
  const int64_t waiting = load_.waiting_sequences + submitting_;
  if (waiting + samples > max_waiting_) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue holds ", waiting, " waiting samples and takes at most ",
                                                     max_waiting_, "; this request has ", samples));
  }
  submitting_ += samples;
  commands_.push_back([this, samples, spec = std::move(spec), sink = std::move(sink)](absl::Time now) mutable {
    loop_->Submit(std::move(spec), std::move(sink), now);
    absl::MutexLock inner(&mutex_);
    submitting_ -= samples;
    load_.waiting_sequences += samples;
  });
  return absl::OkStatus();
}

void Worker::Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason) {
  absl::MutexLock lock(&mutex_);
  commands_.push_back(
      [this, request_id, sample, reason](absl::Time now) { loop_->Abort(request_id, sample, reason, now); });
}

WorkerLoad Worker::Load() const {
  absl::MutexLock lock(&mutex_);
  WorkerLoad load = load_;
  load.waiting_sequences += submitting_;
  return load;
}

absl::Status Worker::Health() const {
  const int64_t began = step_began_;
  const absl::Duration age = absl::Nanoseconds(began == 0 ? 0 : SteadyNanos() - began);
  if (age > step_timeout_) {
    return absl::DeadlineExceededError(
        absl::StrCat("a step, or a Commit's copy, has run for ", absl::ToInt64Seconds(age),
                     " s, longer than --step_timeout_seconds, ", absl::ToDoubleSeconds(step_timeout_),
                     ": the device does not end it"));
  }
  absl::MutexLock lock(&mutex_);
  return failure_;
}

void Worker::Drain(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  commands_.push_back([this](absl::Time) { paused_ = false; });  // or what is in flight could not finish
  const auto done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return idle_ && commands_.empty(); };
  if (mutex_.AwaitWithDeadline(absl::Condition(&done), deadline)) return;
  commands_.push_back([this](absl::Time now) { loop_->AbortAll(AbortReason::kShutdown, now); });
  mutex_.Await(absl::Condition(&done));
}

WeightVersion Worker::weight_version() const {
  absl::MutexLock lock(&mutex_);
  return version_;
}

absl::Status Worker::AtBoundary(absl::AnyInvocable<void(absl::Time now)> command) {
  absl::Notification done;
  {
    absl::MutexLock lock(&mutex_);
    if (ended_ || stop_) return absl::UnavailableError("this worker is stopping");
    commands_.push_back([&](absl::Time now) {
      command(now);
      done.Notify();
    });
  }
  done.WaitForNotification();
  return absl::OkStatus();
}

void Worker::HoldNew(bool hold) {
  holds_ += hold ? 1 : -1;
  loop_->HoldNew(holds_ > 0);
}

bool Worker::AwaitNoneInFlight(const CallLimit& limit) {
  absl::MutexLock lock(&mutex_);
  const auto done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return (in_flight_ == 0 && commands_.empty()) || !failure_.ok() || stop_;
  };
  return limit.Await(mutex_, absl::Condition(&done)) && failure_.ok() && !stop_;
}

absl::StatusOr<WeightSwitchResult> Worker::SwitchWeights(const WeightSwitch& change,
                                                         absl::AnyInvocable<absl::Status()> install) {
  const absl::Time begin = absl::Now();
  InFlightPolicy policy = change.policy;
  const bool finish = policy == InFlightPolicy::kFinish;
  const auto given_up = [&] { return change.given_up != nullptr && change.given_up(); };
  if (finish) {
    bool held = false;
    int64_t in_flight = 0;
    LOCKSTEP_RETURN_IF_ERROR(AtBoundary([&](absl::Time) {
      HoldNew(true);
      held = held_since_.has_value() || paused_;
      in_flight = loop_->in_flight();
    }));
    Failpoint("weights.commit.policy");
    const bool finished =
        held ? in_flight == 0
             : AwaitNoneInFlight({.deadline = begin + change.finish_timeout, .cancelled = change.given_up});
    if (!finished && !change.fallback && !given_up()) {
      LOCKSTEP_RETURN_IF_ERROR(AtBoundary([this](absl::Time) { HoldNew(false); }));
      LOCKSTEP_RETURN_IF_ERROR(Health());
      const std::string why =
          held ? absl::StrCat(in_flight,
                              " samples stand still and cannot finish: their weights are overwritten, or the "
                              "worker is paused")
               : absl::StrCat("samples were still in flight after ", absl::ToInt64Milliseconds(change.finish_timeout),
                              " ms");
      return absl::DeadlineExceededError(absl::StrCat("finish_timeout_ms: ", why, ", and there is no fallback"));
    }
    policy = change.fallback.value_or(InFlightPolicy::kRecompute);
  }
  WeightSwitchResult result;
  absl::Status status;
  Failpoint("weights.commit.boundary");
  LOCKSTEP_RETURN_IF_ERROR(AtBoundary([&](absl::Time now) {
    if (finish) HoldNew(false);
    status = loop_->failure();
    if (!status.ok()) return;
    if (given_up()) {
      status = absl::CancelledError("the client is gone, or the update was rolled back; nothing changed");
      return;
    }
    status = install();
    if (!status.ok()) return loop_->Fail(status);
    Failpoint("weights.commit.installed");
    result = loop_->SwitchWeights(change.version, policy, now);
    Failpoint("weights.commit.switched");
    const absl::Time end = absl::Now();
    result.wait = now - begin;
    result.pause = end - held_since_.value_or(now);
    held_since_.reset();
    absl::MutexLock lock(&mutex_);
    version_ = change.version;
  }));
  if (!status.ok()) return status;
  spdlog::info(
      "weights: ({}, {}) serve; {} samples kept, {} recomputed, {} ended; waited {:.0f} ms, no step for {:.0f} ms",
      change.version.epoch, change.version.step, result.kept, result.recomputed, result.aborted,
      absl::ToDoubleMilliseconds(result.wait), absl::ToDoubleMilliseconds(result.pause));
  return result;
}

absl::Status Worker::HoldSteps() {
  absl::Status status;
  LOCKSTEP_RETURN_IF_ERROR(AtBoundary([&](absl::Time now) {
    // A step ends with the device's: at a boundary nothing runs there.
    status = loop_->failure();
    if (status.ok() && !held_since_) held_since_ = now;
  }));
  return status;
}

void Worker::ReleaseSteps() {
  AtBoundary([this](absl::Time) { held_since_.reset(); }).IgnoreError();
}

void Worker::FailSteps(absl::Status why) {
  AtBoundary([&](absl::Time) { loop_->Fail(std::move(why)); }).IgnoreError();
}

absl::StatusOr<int64_t> Worker::Pause(PauseMode mode, absl::Time deadline, absl::FunctionRef<bool()> given_up) {
  const bool finish = mode == PauseMode::kFinish;
  const int64_t resumes = resumes_;
  const auto resumed = [&] { return resumes_ != resumes; };
  bool paused = false;
  const auto hold = [&](absl::Time) {
    HoldNew(true);
    paused = paused_;
  };
  if (finish && AtBoundary(hold).ok() && !paused) {
    AwaitNoneInFlight({.deadline = deadline, .cancelled = [&] { return given_up() || resumed(); }});
  }
  absl::StatusOr<int64_t> in_flight = 0;
  // A worker that is stopping runs no steps either.
  AtBoundary([&](absl::Time now) {
    if (finish) HoldNew(false);
    if (given_up()) {
      // Whoever does not hear of a pause does not end it either.
      in_flight = absl::CancelledError("the client has gone, or its deadline has passed; the worker is not paused");
    } else if (finish && resumed()) {
      in_flight = absl::AbortedError("a Resume came while samples finished; the worker is not paused");
    } else {
      if (mode == PauseMode::kAbort) loop_->AbortAll(AbortReason::kClient, now);
      paused_ = true;
      in_flight = loop_->in_flight();
      spdlog::info("paused by a client; {} samples stand still until Resume", *in_flight);
    }
  }).IgnoreError();
  return in_flight;
}

void Worker::Resume() {
  ++resumes_;
  AtBoundary([this](absl::Time) {
    if (std::exchange(paused_, false)) spdlog::info("resumed by a client");
  }).IgnoreError();
}

void Worker::Run() {
  loop_->UseOnThisThread();
  absl::Time next_expiry = absl::InfiniteFuture();
  for (;;) {
    std::deque<Command> commands;
    bool stop;
    if (standing()) loop_->Deliver();
    {
      absl::MutexLock lock(&mutex_);
      if (standing()) {
        const auto wake = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return HasWork(); };
        mutex_.AwaitWithDeadline(absl::Condition(&wake), next_expiry);
      }
      commands.swap(commands_);
      stop = stop_;
      // Commands in hand count as work: a drain must not see an idle worker between the queue and the loop.
      if (!commands.empty()) idle_ = false;
    }
    if (!commands.empty()) step_began_ = SteadyNanos();  // a Commit's copy is the device's too
    for (Command& command : commands) command(absl::Now());
    step_began_ = 0;
    if (stop) loop_->AbortAll(AbortReason::kShutdown, absl::Now());
    next_expiry = loop_->Expire(absl::Now());
    // A failed loop's step runs nothing: it ends what is in flight.
    if ((!paused_ && !held_since_) || stop || !loop_->failure().ok()) {
      step_began_ = SteadyNanos();
      loop_->Step();
      step_began_ = 0;
    }
    {
      absl::MutexLock lock(&mutex_);
      failure_ = loop_->failure();
      load_ = loop_->Load();
      load_.paused = paused_;
      idle_ = loop_->idle();
      in_flight_ = loop_->in_flight();
      ended_ = stop;
      // Whoever came too late for the loop.
      if (stop) commands = std::exchange(commands_, {});
    }
    if (stop) {
      for (Command& command : commands) command(absl::Now());
    }
    if (stop) return;
  }
}

}  // namespace lockstep

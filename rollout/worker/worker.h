// The worker: one thread that owns the step loop, and a queue of commands for it. Everything a client or the control
// plane wants takes effect at a step boundary.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rollout/worker/request.h"
#include "rollout/worker/step_loop.h"
#include "weights_sync/call_limit.h"

namespace lockstep {

class Worker : public WorkerInterface, public WorkerControl {
 public:
  // `max_waiting`: sequences (samples) accepted but not running; past it Submit is RESOURCE_EXHAUSTED. `owned` lives
  // until the thread has ended: whatever the loop stands on. `step_timeout`: a step that takes longer never ends.
  Worker(std::unique_ptr<StepLoop> loop, int64_t max_waiting, std::shared_ptr<void> owned,
         absl::Duration step_timeout = absl::InfiniteDuration());
  // Aborts what is in flight (kShutdown) and joins the thread.
  ~Worker() override;

  absl::Status Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink) override;
  void Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason) override;
  WorkerLoad Load() const override;
  WeightVersion weight_version() const override;
  absl::StatusOr<WeightSwitchResult> SwitchWeights(const WeightSwitch& change,
                                                   absl::AnyInvocable<absl::Status()> install) override;
  absl::Status HoldSteps() override;
  void ReleaseSteps() override;
  void FailSteps(absl::Status why) override;
  absl::StatusOr<int64_t> Pause(PauseMode mode, absl::Time deadline, absl::FunctionRef<bool()> given_up) override;
  void Resume() override;
  absl::Status Health() const override;
  void Drain(absl::Time deadline) override;

 private:
  using Command = absl::AnyInvocable<void(absl::Time now)>;
  void Run();
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !commands_.empty() || stop_; }
  // Runs `command` at the next step boundary and waits for it. UNAVAILABLE: the thread has ended, or is about to.
  absl::Status AtBoundary(absl::AnyInvocable<void(absl::Time now)> command);
  // No step may run, or there is nothing to run.
  bool standing() const { return loop_->idle() || paused_ || held_since_ || loop_->stalled(); }
  // For one more, or one less, that waits for samples in flight to finish. At a boundary.
  void HoldNew(bool hold);
  // Waits until no sample is in flight; false: not by the limit, or the device failed.
  bool AwaitNoneInFlight(const CallLimit& limit);

  std::shared_ptr<void> owned_;
  std::unique_ptr<StepLoop> loop_;  // the thread's alone, but for CheckFits, which reads constants
  const int64_t max_waiting_;
  const absl::Duration step_timeout_;
  std::atomic<int64_t> step_began_{0};  // by the steady clock, in nanoseconds; 0: no step runs

  mutable absl::Mutex mutex_;
  std::deque<Command> commands_ ABSL_GUARDED_BY(mutex_);
  int64_t submitting_ ABSL_GUARDED_BY(mutex_) = 0;  // sequences in commands not yet applied
  WorkerLoad load_ ABSL_GUARDED_BY(mutex_);         // as of the last step boundary
  bool idle_ ABSL_GUARDED_BY(mutex_) = true;        // nothing in flight, as of the last step boundary
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;     // the thread runs no more commands
  int64_t in_flight_ ABSL_GUARDED_BY(mutex_) = 0;  // as of the last step boundary
  WeightVersion version_ ABSL_GUARDED_BY(mutex_);
  // No step runs while either is set; both the thread's alone.
  bool paused_ = false;                           // a client's Pause
  std::atomic<int64_t> resumes_{0};               // so far
  std::optional<absl::Time> held_since_;          // HoldSteps
  int holds_ = 0;                                 // Pauses and Commits that hold new samples; likewise
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // of the device
  std::thread thread_;
};

}  // namespace lockstep

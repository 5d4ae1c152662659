// One worker's requests, from submission to last token: turns requests into sequences, plans with the scheduler, runs
// the engine, matches stops and hands results to sinks. Single-threaded and synchronous; Worker drives it from its
// thread, tools and tests drive it directly.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rollout/engine/engine.h"
#include "rollout/model/tokenizer.h"
#include "rollout/scheduler/scheduler.h"
#include "rollout/worker/outbox.h"
#include "rollout/worker/request.h"
#include "rollout/worker/stop.h"

namespace lockstep {

class StepLoop {
 public:
  // `token_bytes` may be null: then requests with stop strings must not be submitted. All must outlive it.
  StepLoop(Engine& engine, const SchedulerConfig& config, const TokenBytes* token_bytes);
  ~StepLoop();

  // The request's id is not in flight, and the spec passed validation and CheckFits.
  void Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink, absl::Time now);
  absl::Status CheckFits(const RequestSpec& spec) const;
  bool Contains(const std::string& request_id) const { return requests_.contains(request_id); }

  // Ends a sample (or all), keeping what was delivered. Unknown ids are ignored.
  void Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason, absl::Time now);
  void AbortAll(AbortReason reason, absl::Time now);
  // Ends requests whose time budget has passed. Returns the next such time.
  absl::Time Expire(absl::Time now);

  // Before the first Step() of a thread that did not make the loop; if it fails, the device has.
  void UseOnThisThread() { failure_.Update(engine_.UseOnThisThread()); }

  // Runs one step. False: no request is in flight, or the device has failed. What it found is handed to the sinks by
  // the next Step(), while the device runs that one, or by Deliver(); all else here hands over what there is at once.
  bool Step();
  void Deliver();
  // Not ok once the device has failed: every request was ended with this error, and no step can run again.
  const absl::Status& failure() const { return failure_; }
  // The device has failed elsewhere than in a step.
  void Fail(absl::Status failure) { failure_ = std::move(failure); }

  // While held, no sample starts that never ran.
  void HoldNew(bool hold) { scheduler_.HoldNew(hold); }
  // Samples that ran at least once and have not ended.
  int64_t in_flight() const { return scheduler_.started(); }
  // The last Step() found nothing to run although requests wait: they are held.
  bool stalled() const { return stalled_; }
  // The weights are those of `version` from now on; kFinish is the caller's to wait for. Counts what became of samples
  // in flight. Under kKeep a sample without a token, or without a whole state, is recomputed; and whatever the policy,
  // a request of which only some prompt log-probabilities were delivered ends, with samples of it that never ran, since
  // the rest would be of other weights.
  WeightSwitchResult SwitchWeights(const WeightVersion& version, InFlightPolicy policy, absl::Time now);
  const WeightVersion& weight_version() const { return weight_version_; }

  bool idle() const { return requests_.empty(); }
  int64_t waiting_sequences() const { return scheduler_.waiting(); }
  WorkerLoad Load() const;

 private:
  struct Request;
  struct Sequence;

  void PlanPromptLogprobs(Sequence& sequence, int64_t piece_index, const PlannedPiece& piece);
  void PlanSample(Sequence& sequence, int64_t piece_index, const PlannedPiece& piece);
  void AbortSamples(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason, absl::Time now);
  void OnForcedFailure(Request& request, const absl::Status& failure, absl::Time now);
  void OnSampled(Sequence& sequence, absl::StatusOr<SampledToken> sampled, absl::Time now);
  void Finish(Sequence& sequence, SampleResult result, absl::Time now);
  void FinishAborted(Sequence& sequence, AbortReason reason, std::string message, absl::Time now);
  Sequence& Get(SequenceId id) { return *sequences_.at(id); }

  Engine& engine_;
  Scheduler scheduler_;
  const TokenBytes* token_bytes_;
  std::unordered_map<std::string, std::unique_ptr<Request>> requests_;
  absl::flat_hash_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::multimap<absl::Time, std::string> expiries_;
  SequenceId next_id_ = 1;
  WorkerLoad totals_;
  absl::Status failure_;
  bool stalled_ = false;
  WeightVersion weight_version_;
  absl::Time weights_since_ = absl::Now();

  Outbox outbox_;
  // When the step before had ended, if nothing has come between.
  absl::Time last_results_ = absl::InfinitePast();

  // The step in preparation; members to keep their memory from step to step.
  struct TaskOwner {
    SequenceId sequence;
    bool forced;
  };
  std::vector<EnginePiece> pieces_;
  std::vector<RowTask> tasks_;
  std::vector<TaskOwner> owners_;   // by task
  std::vector<SequenceId> scored_;  // done with this step, unless it fails
  std::vector<StateCopy> copies_;
  std::vector<StateSwap> saves_, restores_;
};

}  // namespace lockstep

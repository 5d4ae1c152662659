#include "rollout/server/request_starter.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr absl::Duration kPollPeriod = absl::Milliseconds(20);

}  // namespace

int64_t RetryAfterMs(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return 500;
    case absl::StatusCode::kUnavailable:
      return 1000;
    default:
      return 0;
  }
}

absl::Status DrainingError() {
  return absl::UnavailableError("the worker is draining and takes no new requests; retry at another worker");
}

RequestStarter::RequestStarter(WorkerInterface* worker, RequestRegistry* registry, TaskThread* tasks,
                               absl::Duration max_version_wait, int64_t max_waiting)
    : worker_(worker),
      registry_(registry),
      tasks_(tasks),
      max_version_wait_(max_version_wait),
      max_waiting_(max_waiting) {}

absl::Status RequestStarter::Start(RequestSpec spec, std::shared_ptr<RequestState> state, std::weak_ptr<Reader> reader,
                                   int64_t stream_interval, absl::Time deadline,
                                   std::optional<WeightVersion> min_version, absl::Time arrival) {
  LOCKSTEP_RETURN_IF_ERROR(state->Attach(std::move(reader), stream_interval, {}, deadline));
  SubmitOrWait(std::move(spec), std::move(state), min_version, arrival);
  return absl::OkStatus();
}

void RequestStarter::SubmitOrWait(RequestSpec spec, std::shared_ptr<RequestState> state,
                                  std::optional<WeightVersion> min_version, absl::Time arrival) {
  if (min_version && worker_->weight_version() < *min_version) {
    absl::ReleasableMutexLock lock(&mutex_);
    if (static_cast<int64_t>(waiters_.size()) >= max_waiting_) {
      lock.Release();
      return Fail(*state, absl::ResourceExhaustedError(absl::StrCat(
                              max_waiting_, " requests already wait for min_weight_version; that is the limit")));
    }
    if (!draining_) {
      state->BeginWait();
      waiters_.push_back({std::move(spec), std::move(state), *min_version, arrival});
      if (waiters_.size() == 1) tasks_->AddAt(absl::Now() + kPollPeriod, [this] { Poll(); });
      return;
    }
  }
  if (draining()) return Fail(*state, DrainingError());
  RequestState& request = *state;
  Submit(std::move(spec), request, std::move(state), arrival);
}

void RequestStarter::Submit(RequestSpec spec, RequestState& state, std::shared_ptr<RequestState> sink,
                            absl::Time arrival) {
  if (!state.BeginSubmit()) return;
  if (spec.time_budget != absl::InfiniteDuration()) {
    spec.time_budget = std::max(spec.time_budget - (absl::Now() - arrival), absl::ZeroDuration());
  }
  const std::shared_ptr<RequestState> keep = sink;
  const absl::Status status = worker_->Submit(std::move(spec), std::move(sink));
  if (!status.ok()) return Fail(state, status);
  for (const PendingAbort& abort : state.EndSubmit())
    worker_->Abort(state.info().worker_id, abort.sample, abort.reason);
  registry_->WatchDue(state);
}

void RequestStarter::Fail(RequestState& state, absl::Status status) {
  registry_->Forget(state);
  const int64_t retry_after_ms = RetryAfterMs(status);
  state.Fail({std::move(status), retry_after_ms});
}

void RequestStarter::Poll() {
  const absl::Time now = absl::Now();
  const WeightVersion version = worker_->weight_version();
  std::vector<Waiter> ready;
  {
    absl::MutexLock lock(&mutex_);
    std::vector<Waiter> waiting;
    for (Waiter& waiter : waiters_) {
      const bool over = now >= std::min({waiter.state->deadline(), waiter.arrival + waiter.spec.time_budget,
                                         waiter.arrival + max_version_wait_});
      const bool start = version >= waiter.min_version || over || waiter.state->finished();
      (start ? ready : waiting).push_back(std::move(waiter));
    }
    waiters_ = std::move(waiting);
    if (!waiters_.empty()) tasks_->AddAt(now + kPollPeriod, [this] { Poll(); });
  }
  for (Waiter& waiter : ready) {
    RequestState& state = *waiter.state;
    if (state.finished()) continue;  // aborted while it waited
    if (version >= waiter.min_version) {
      Submit(std::move(waiter.spec), state, std::move(waiter.state), waiter.arrival);
      continue;
    }
    const std::string what =
        absl::StrCat("min_weight_version: waited for (", waiter.min_version.epoch, ", ", waiter.min_version.step,
                     "); the worker has (", version.epoch, ", ", version.step, ")");
    const bool own_limit = now >= std::min(state.deadline(), waiter.arrival + waiter.spec.time_budget);
    Fail(state, own_limit ? absl::DeadlineExceededError(what) : absl::UnavailableError(what));
  }
}

void RequestStarter::Drain() {
  std::vector<Waiter> waiters;
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    waiters.swap(waiters_);
  }
  for (Waiter& waiter : waiters) Fail(*waiter.state, DrainingError());
}

bool RequestStarter::draining() const {
  absl::MutexLock lock(&mutex_);
  return draining_;
}

int64_t RequestStarter::waiting() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(waiters_.size());
}

}  // namespace lockstep

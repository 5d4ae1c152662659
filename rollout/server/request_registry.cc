#include "rollout/server/request_registry.h"

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace lockstep {
namespace {

// What goes first when retained results need room. Within a class the longest idle goes first.
enum class DropClass : uint8_t { kDelivered, kUndelivered, kDetachedRunning, kBeingRead, kKeep };

DropClass Classify(const RequestState& state) {
  if (state.retained_bytes() == 0) return DropClass::kKeep;
  if (state.has_reader()) {
    // Live requests with undelivered results in the buffered pool are not this pool's to drop (their delivered part is
    // trimmed).
    return state.buffered_bytes() > 0 || !state.finished() ? DropClass::kKeep : DropClass::kBeingRead;
  }
  if (!state.finished()) return DropClass::kDetachedRunning;
  return state.fully_delivered() ? DropClass::kDelivered : DropClass::kUndelivered;
}

// Below the budget by an eighth, so that a worker at its budget does not reclaim for every token.
int64_t Target(int64_t budget) {
  return budget - budget / 8;
}

}  // namespace

RequestRegistry::RequestRegistry(WorkerInterface* worker, const RegistryOptions& options, TaskThread* tasks)
    : worker_(worker), options_(options), tasks_(tasks) {
  ScheduleExpiry();
}

void RequestRegistry::ScheduleExpiry() {
  const absl::Duration period = std::clamp(options_.reattach / 4, absl::Milliseconds(50), absl::Seconds(1));
  tasks_->AddAt(absl::Now() + period, [this] {
    Expire(absl::Now());
    ScheduleExpiry();
  });
}

absl::StatusOr<std::shared_ptr<RequestState>> RequestRegistry::Add(RequestInfo info) {
  if (pools_.buffered > options_.max_buffered_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("undelivered results hold ", pools_.buffered.load(), " of ",
                                                     options_.max_buffered_bytes, " bytes; read them or retry later"));
  }
  // '#' cannot occur in a client's id, so these never meet.
  info.worker_id = absl::StrCat(info.request_id, "#", next_serial_.fetch_add(1));
  std::shared_ptr<RequestState> replaced;
  auto state = std::make_shared<RequestState>(std::move(info), &pools_, this);
  {
    absl::MutexLock lock(&mutex_);
    std::shared_ptr<RequestState>& entry = requests_[state->info().request_id];
    if (entry != nullptr && (!entry->finished() || entry->has_reader())) {
      return absl::AlreadyExistsError(
          absl::StrCat("request_id: \"", state->info().request_id,
                       "\" is in flight; want an id that is not in use, or `attach` to read it"));
    }
    replaced = std::exchange(entry, state);
  }
  if (replaced != nullptr) replaced->Drop();
  return state;
}

std::shared_ptr<RequestState> RequestRegistry::Find(const std::string& request_id) const {
  absl::MutexLock lock(&mutex_);
  const auto it = requests_.find(request_id);
  return it == requests_.end() ? nullptr : it->second;
}

void RequestRegistry::Forget(const RequestState& state) {
  std::shared_ptr<RequestState> last;  // destroyed outside the lock
  absl::MutexLock lock(&mutex_);
  const auto it = requests_.find(state.info().request_id);
  if (it == requests_.end() || it->second.get() != &state) return;
  last = std::move(it->second);
  requests_.erase(it);
}

bool RequestRegistry::Abort(RequestState& state, std::optional<int32_t> sample, AbortReason reason) {
  bool in_flight = false;
  if (state.RequestAbort(sample, reason, &in_flight)) worker_->Abort(state.info().worker_id, sample, reason);
  return in_flight;
}

void RequestRegistry::WatchDue(const RequestState& state) {
  ScheduleDue(state.due());
}

void RequestRegistry::ScheduleDue(absl::Time due) {
  absl::MutexLock lock(&mutex_);
  if (due >= next_due_) return;
  next_due_ = due;
  tasks_->AddAt(due, [this, due] {
    {
      absl::MutexLock then(&mutex_);
      if (next_due_ != due) return;  // an earlier one has taken its place
      next_due_ = absl::InfiniteFuture();
    }
    EndDue(absl::Now());
  });
}

void RequestRegistry::EndDue(absl::Time now) {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& state : Snapshot()) {
    const absl::Time due = state->due();
    if (due <= now) {
      Abort(*state, std::nullopt, AbortReason::kDeadline);
    } else {
      next = std::min(next, due);
    }
  }
  ScheduleDue(next);
}

void RequestRegistry::Detach(RequestState& state, const Reader* reader, RequestState::DetachReason reason) {
  const RequestState::Detached detached = state.Detach(reader, reason, absl::Now());
  if (detached.abort) Abort(state, std::nullopt, *detached.abort);
  if (detached.forget) DropAndForget(state);
}

void RequestRegistry::Wake(std::weak_ptr<Reader> reader) {
  tasks_->Add([reader = std::move(reader)] {
    if (const auto alive = reader.lock()) alive->Pump();
  });
}

void RequestRegistry::BytesGrew() {
  if (pools_.buffered <= options_.max_buffered_bytes && pools_.retained <= options_.max_retained_bytes) return;
  if (reclaim_scheduled_.exchange(true)) return;
  tasks_->Add([this] {
    reclaim_scheduled_ = false;
    Reclaim();
  });
}

std::vector<std::shared_ptr<RequestState>> RequestRegistry::Snapshot() const {
  absl::MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<RequestState>> states;
  states.reserve(requests_.size());
  for (const auto& [id, state] : requests_) states.push_back(state);
  return states;
}

void RequestRegistry::DropAndForget(RequestState& state) {
  state.Drop();
  Forget(state);
}

void RequestRegistry::Reclaim() {
  const auto states = Snapshot();
  ReclaimBuffered(states);
  ReclaimRetained(states);
}

void RequestRegistry::SendEarly(const std::vector<std::shared_ptr<RequestState>>& states) {
  std::vector<std::pair<int64_t, RequestState*>> held;
  held.reserve(states.size());
  for (const auto& state : states) held.emplace_back(state->buffered_bytes(), state.get());
  std::sort(held.begin(), held.end(), std::greater<>());
  for (const auto& [bytes, state] : held) {
    if (bytes == 0 || pools_.buffered <= Target(options_.max_buffered_bytes)) return;
    if (const auto reader = state->SendEarly()) reader->Pump();
  }
}

void RequestRegistry::ReclaimBuffered(const std::vector<std::shared_ptr<RequestState>>& states) {
  // What a reader waits for the rest of is no reason to cut it.
  if (pools_.buffered > options_.max_buffered_bytes) SendEarly(states);
  while (pools_.buffered > options_.max_buffered_bytes) {
    RequestState* largest = nullptr;
    int64_t bytes = 0;
    for (const auto& state : states) {
      if (const int64_t held = state->buffered_bytes(); held > bytes) {
        largest = state.get();
        bytes = held;
      }
    }
    if (largest == nullptr) return;
    largest->Cut();
    Abort(*largest, std::nullopt, AbortReason::kBufferLimit);
  }
}

void RequestRegistry::ReclaimRetained(const std::vector<std::shared_ptr<RequestState>>& states) {
  if (pools_.retained <= options_.max_retained_bytes) return;
  const int64_t target = Target(options_.max_retained_bytes);
  std::array<std::vector<std::pair<absl::Time, RequestState*>>, 5> classes;
  for (const auto& state : states)
    classes[static_cast<size_t>(Classify(*state))].emplace_back(state->idle_since(), state.get());
  const auto drop = [&](DropClass drop_class) {
    auto& candidates = classes[static_cast<size_t>(drop_class)];
    std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [idle_since, state] : candidates) {
      if (pools_.retained <= target) return;
      Abort(*state, std::nullopt, AbortReason::kBufferLimit);
      DropAndForget(*state);
    }
  };
  drop(DropClass::kDelivered);
  for (const auto& state : states) {
    if (pools_.retained <= target) return;
    state->Trim();
  }
  drop(DropClass::kUndelivered);
  drop(DropClass::kDetachedRunning);
  drop(DropClass::kBeingRead);
}

void RequestRegistry::Expire(absl::Time now) {
  for (const auto& state : Snapshot()) {
    if (now - state->idle_since() >= options_.reattach) DropAndForget(*state);
  }
}

int64_t RequestRegistry::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(requests_.size());
}

}  // namespace lockstep

#include "weights_sync/update.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/host_values.h"
#include "rollout/base/check.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr size_t kShown = 10;
// For what an update overwrote to be put back: many times what the largest model takes.
constexpr absl::Duration kRestoreWait = absl::Seconds(120);

}  // namespace

const char* UpdateStateName(UpdateState state) {
  switch (state) {
    case UpdateState::kServing:
      return "SERVING";
    case UpdateState::kReceiving:
      return "RECEIVING";
    case UpdateState::kVerified:
      return "VERIFIED";
    case UpdateState::kCommitting:
      return "COMMITTING";
    case UpdateState::kRestoring:
      return "RESTORING";
  }
  return "unknown";
}

WeightUpdate::WeightUpdate(TensorTable* table, WeightVersion serving, StepGate* gate,
                           absl::Duration dropped_receive_wait)
    : table_(*table),
      shadow_(table->shadow()),
      gate_(gate),
      dropped_receive_wait_(dropped_receive_wait),
      serving_(serving) {
  LOCKSTEP_CHECK(shadow_ == nullptr || gate_ != nullptr, "a table without a second place needs a gate for the steps");
  if (shadow_ != nullptr) keeper_ = std::thread([this] { Keep(); });
}

WeightUpdate::~WeightUpdate() {
  if (!keeper_.joinable()) return;
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  keeper_.join();
}

void WeightUpdate::Keep() {
  while (true) {
    bool restore;
    absl::Status status;
    {
      absl::MutexLock lock(&mutex_);
      const auto called = [this]()
                              ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return ending_ || upkeep_ != Upkeep::kNone; };
      mutex_.Await(absl::Condition(&called));
      if (ending_) return;
      restore = upkeep_ == Upkeep::kRestore;
      // A receive that was dropped may still write.
      const CallLimit limit = {.deadline = std::max(absl::Now(), receive_deadline_) + dropped_receive_wait_,
                               .cancelled = [this] { return ending_.load(); }};
      status = AwaitInbox(limit, "the dropped receive has not ended");
    }
    if (status.ok()) status = restore ? shadow_->Restore(ending_) : shadow_->Write(ending_);
    if (ending_) return;
    if (!status.ok()) {
      status = absl::InternalError(absl::StrCat(
          restore ? "what an update overwrote could not be restored: " : "the weights that serve could not be copied: ",
          status.message(), "; this worker must be started again"));
      gate_->FailSteps(status);
    } else if (restore) {
      gate_->ReleaseSteps();
    }
    absl::MutexLock lock(&mutex_);
    upkeep_ = Upkeep::kNone;
    if (!status.ok()) lost_ = status;
  }
}

absl::Status WeightUpdate::AwaitShadow(const CallLimit& limit, const char* what) {
  const auto done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return upkeep_ == Upkeep::kNone; };
  if (limit.Await(mutex_, absl::Condition(&done))) return lost_;
  LOCKSTEP_RETURN_IF_ERROR(limit.CheckClient());
  const TensorShadow::Progress progress = shadow_->progress();
  return absl::UnavailableError(
      absl::StrCat(what, ": the copy of the version that serves ",
                   upkeep_ == Upkeep::kRestore ? "restores what an update overwrote" : "is still being written", ", ",
                   progress.done, " of ", progress.total, " bytes so far; try again"));
}

absl::Status WeightUpdate::AwaitRestored(const char* what) {
  return upkeep_ == Upkeep::kRestore ? AwaitShadow({.deadline = absl::Now() + kRestoreWait}, what) : absl::OkStatus();
}

absl::Status WeightUpdate::Hold(Open& open) {
  if (shadow_ == nullptr || open.holds) return absl::OkStatus();
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.hold.before"));
  LOCKSTEP_RETURN_IF_ERROR(gate_->HoldSteps());
  open.holds = true;
  Failpoint("weights.hold.held");
  return absl::OkStatus();
}

absl::Status WeightUpdate::BeforeStaging(const WeightVersion& version) {
  absl::MutexLock lock(&mutex_);
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, Get(version, UpdateState::kReceiving));
  return Hold(*open);
}

void WeightUpdate::DropExpired() {
  if (open_ != nullptr && open_->state != UpdateState::kCommitting &&
      std::chrono::steady_clock::now() >= open_->expires) {
    Failpoint("weights.lease.expired");
    Drop();
  }
}

void WeightUpdate::Drop() {
  *open_->dropped = true;
  if (open_->holds) {
    upkeep_ = Upkeep::kRestore;
    undone_ = open_->version;
  }
  open_.reset();
}

void WeightUpdate::ExpireLease() {
  // Whoever has it drops what has expired as well, or is about to be asked again.
  if (!mutex_.TryLock()) return;
  DropExpired();
  mutex_.Unlock();
}

std::vector<int64_t> WeightUpdate::ReceivedOf(const Open& open) {
  std::vector<int64_t> received;
  received.reserve(open.arriving.size());
  for (const Arriving& a : open.arriving) received.push_back(a.received);
  return received;
}

absl::StatusOr<WeightUpdate::Open*> WeightUpdate::GetUncommitted(const WeightVersion& version) {
  DropExpired();
  const bool verified = open_ != nullptr && open_->version == version && open_->state == UpdateState::kVerified;
  return Get(version, verified ? UpdateState::kVerified : UpdateState::kReceiving);
}

absl::StatusOr<WeightUpdate::Open*> WeightUpdate::Get(const WeightVersion& version, UpdateState want) {
  DropExpired();
  if (open_ == nullptr || open_->version != version) {
    return absl::NotFoundError(
        absl::StrCat("version: no update to ", VersionText(version), " is open",
                     open_ == nullptr ? "" : absl::StrCat("; one to ", VersionText(open_->version), " is"),
                     "; version ", VersionText(serving_), " serves"));
  }
  if (open_->state != want) {
    return absl::FailedPreconditionError(absl::StrCat("the update to ", VersionText(version), " is ",
                                                      UpdateStateName(open_->state), ", want ", UpdateStateName(want)));
  }
  StartLease(*open_);
  return open_.get();
}

void WeightUpdate::StartLease(Open& open) {
  open.expires = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(open.lease);
}

absl::Status WeightUpdate::CheckVersion(const WeightVersion& version) const {
  if (version > serving_) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("version: ", VersionText(version), " is not after ",
                                                    VersionText(serving_),
                                                    ", which serves; a restarted run opens a new epoch"));
}

absl::StatusOr<std::vector<int64_t>> WeightUpdate::Begin(const WeightVersion& version, Manifest manifest,
                                                         absl::Duration lease, const CallLimit& limit) {
  absl::MutexLock lock(&mutex_);
  DropExpired();
  LOCKSTEP_RETURN_IF_ERROR(CheckVersion(version));
  // Of an update that was dropped, or committed.
  while (open_ == nullptr && (receiving_ || upkeep_ != Upkeep::kNone)) {
    LOCKSTEP_RETURN_IF_ERROR(AwaitInbox(limit, "Begin: a receive of an earlier update is still under way; try again"));
    LOCKSTEP_RETURN_IF_ERROR(AwaitShadow(limit, "Begin"));
  }
  LOCKSTEP_RETURN_IF_ERROR(lost_);
  LOCKSTEP_RETURN_IF_ERROR(CheckVersion(version));
  if (open_ != nullptr) {
    if (open_->version != version || open_->manifest != manifest) {
      return absl::FailedPreconditionError(absl::StrCat(
          "an update to ", VersionText(open_->version), " is ", UpdateStateName(open_->state),
          open_->version == version ? " with another manifest" : "", "; roll it back or wait for its lease to end"));
    }
    if (open_->state == UpdateState::kCommitting) {
      return absl::FailedPreconditionError(absl::StrCat("the update to ", VersionText(version), " is COMMITTING"));
    }
    open_->lease = lease;
    StartLease(*open_);
    return ReceivedOf(*open_);
  }
  if (manifest.base_version && *manifest.base_version != serving_) {
    return absl::FailedPreconditionError(absl::StrCat("manifest.base_version: ", VersionText(*manifest.base_version),
                                                      "; version ", VersionText(serving_), " serves"));
  }
  auto open = std::make_unique<Open>();
  LOCKSTEP_ASSIGN_OR_RETURN(open->places, PlaceTensors(manifest, table_.slots()));
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.begin.checked"));
  table_.BeginUpdate();
  open->version = version;
  open->manifest = std::move(manifest);
  open->arriving.resize(open->places.size());
  open->lease = lease;
  StartLease(*open);
  open_ = std::move(open);
  return ReceivedOf(*open_);
}

absl::Status WeightUpdate::Push(const WeightVersion& version, int64_t tensor, int64_t offset,
                                std::span<const std::byte> data) {
  absl::MutexLock lock(&mutex_);
  // Of a verified one everything is there already: what a learner sends again is skipped.
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, GetUncommitted(version));
  if (tensor < 0 || tensor >= static_cast<int64_t>(open->places.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor: ", tensor, "; want 0 to ", open->places.size() - 1, ", an index into the manifest"));
  }
  if (receiving_) return absl::FailedPreconditionError("a Receive is under way; Push after it");
  const std::string& name = open->manifest.tensors[tensor].name;
  const DType dtype = open->manifest.tensors[tensor].dtype;
  const int64_t total = open->places[tensor].bytes, size = static_cast<int64_t>(data.size());
  if (offset < 0 || offset > total || size > total - offset || size % DTypeBytes(dtype) != 0 ||
      offset % DTypeBytes(dtype) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("data: ", size, " bytes at ", offset, " of tensor ", name,
                                                   "; want whole values within its ", total, " bytes"));
  }
  Arriving& arriving = open->arriving[tensor];
  if (offset > arriving.received) {
    return absl::FailedPreconditionError(
        absl::StrCat("offset: ", offset, " of tensor ", name, "; its received bytes end at ", arriving.received));
  }
  const int64_t known = std::min(arriving.received - offset, size);
  data = data.subspan(known);
  if (data.empty()) return absl::OkStatus();
  // Before the tensor is whole, so that a failure leaves it to be sent on.
  if (arriving.received + static_cast<int64_t>(data.size()) == total) LOCKSTEP_RETURN_IF_ERROR(Hold(*open));
  if (arriving.bytes.empty()) {
    const auto partial =
        std::count_if(open->arriving.begin(), open->arriving.end(), [](const Arriving& a) { return !a.bytes.empty(); });
    if (partial >= static_cast<int64_t>(kMaxPartialTensors)) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor: ", partial, " tensors are partly received; finish one before ", name, " begins"));
    }
    arriving.bytes = TakeMemory(*open, total);
  }
  std::memcpy(arriving.bytes.data() + arriving.received, data.data(), data.size());
  arriving.digester.Add(data);
  arriving.non_finite += CountNonFinite(data.data(), dtype, static_cast<int64_t>(data.size()) / DTypeBytes(dtype));
  arriving.received += static_cast<int64_t>(data.size());
  Failpoint("weights.push.received");
  if (arriving.received < total) return absl::OkStatus();
  absl::Status staged = StageWhole(*open, tensor);
  Failpoint("weights.push.staged");
  if (!staged.ok()) Drop();
  return staged;
}

absl::Status WeightUpdate::AwaitInbox(const CallLimit& limit, const char* what) {
  const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !receiving_; };
  if (limit.Await(mutex_, absl::Condition(&free))) return absl::OkStatus();
  LOCKSTEP_RETURN_IF_ERROR(limit.CheckClient());
  return absl::UnavailableError(what);
}

absl::StatusOr<Receive> WeightUpdate::BeginReceive(const WeightVersion& version, std::vector<int64_t> tensors,
                                                   const CallLimit& limit, const std::function<absl::Status()>& ready) {
  if (table_.inbox() == nullptr) return absl::UnimplementedError("this worker takes weights over the stream only");
  {
    absl::MutexLock lock(&mutex_);
    LOCKSTEP_RETURN_IF_ERROR(GetUncommitted(version).status());
    LOCKSTEP_RETURN_IF_ERROR(AwaitInbox(limit, "Receive: another one is still under way; try again"));
    LOCKSTEP_RETURN_IF_ERROR(GetUncommitted(version).status());
    receiving_ = true;
    receive_deadline_ = limit.deadline;
  }
  const absl::Status is_ready = ready();
  absl::MutexLock lock(&mutex_);
  absl::StatusOr<Receive> receive = is_ready.ok() ? OpenInbox(version, std::move(tensors)) : is_ready;
  receiving_ = receive.ok();
  return receive;
}

absl::StatusOr<Receive> WeightUpdate::OpenInbox(const WeightVersion& version, std::vector<int64_t> tensors) {
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, GetUncommitted(version));
  const int64_t count = static_cast<int64_t>(open->places.size());
  if (tensors.empty()) {
    tensors.resize(count);
    std::iota(tensors.begin(), tensors.end(), 0);
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] < 0 || tensors[i] >= count || (i > 0 && tensors[i] <= tensors[i - 1])) {
      return absl::InvalidArgumentError(absl::StrCat("tensors[", i, "]: ", tensors[i],
                                                     "; want ascending indices into the manifest, 0 to ", count - 1));
    }
  }
  std::vector<ExpectedTensor> expected;
  for (const int64_t t : tensors) {
    const TensorPlace& place = open->places[t];
    expected.push_back({.slot = place.slot,
                        .first_row = place.first_row,
                        .rows = place.rows,
                        .dtype = open->manifest.tensors[t].dtype});
  }
  LOCKSTEP_RETURN_IF_ERROR(table_.inbox()->Open(std::move(expected)));
  Receive receive = {.tensors = tensors, .bytes = {}, .dtypes = {}, .dropped = open->dropped};
  for (int64_t t = 0; t < count; ++t) {
    receive.bytes.push_back(open->places[t].bytes);
    receive.dtypes.push_back(open->manifest.tensors[t].dtype);
  }
  for (const int64_t t : tensors) open->arriving[t] = Arriving();
  open->state = UpdateState::kReceiving;  // also after Verify: a learner that sends it again
  open->arriving_bytes = 0;
  inbox_tensors_ = std::move(tensors);
  return receive;
}

absl::Status WeightUpdate::Renew(const WeightVersion& version) {
  absl::MutexLock lock(&mutex_);
  return Get(version, UpdateState::kReceiving).status();
}

absl::Status WeightUpdate::NoteProgress(const WeightVersion& version, int64_t bytes) {
  absl::MutexLock lock(&mutex_);
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, Get(version, UpdateState::kReceiving));
  open->arriving_bytes = bytes;
  return absl::OkStatus();
}

absl::Status WeightUpdate::EndReceive(const WeightVersion& version, const absl::Status& arrived) {
  absl::MutexLock lock(&mutex_);
  receiving_ = false;
  const absl::StatusOr<Open*> open = Get(version, UpdateState::kReceiving);
  if (open.ok()) (*open)->arriving_bytes = 0;
  LOCKSTEP_RETURN_IF_ERROR(arrived);
  LOCKSTEP_RETURN_IF_ERROR(open.status());
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<ArrivedTensor> tensors, table_.inbox()->Close());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t t = inbox_tensors_[i];
    (*open)->arriving[t].received = (*open)->places[t].bytes;
    (*open)->arriving[t].digest = tensors[i].digest;
    (*open)->arriving[t].non_finite = tensors[i].non_finite;
  }
  return absl::OkStatus();
}

std::vector<std::byte> WeightUpdate::TakeMemory(Open& open, int64_t bytes) {
  auto least = open.spare.end();
  for (auto i = open.spare.begin(); i != open.spare.end(); ++i) {
    if (static_cast<int64_t>(i->size()) >= bytes && (least == open.spare.end() || i->size() < least->size())) least = i;
  }
  if (least == open.spare.end()) return std::vector<std::byte>(bytes);
  std::vector<std::byte> memory = std::move(*least);
  open.spare.erase(least);
  return memory;
}

void WeightUpdate::KeepMemory(Open& open, std::vector<std::byte> memory) {
  open.spare.push_back(std::move(memory));
  if (open.spare.size() <= kMaxSpare) return;
  open.spare.erase(std::min_element(open.spare.begin(), open.spare.end(),
                                    [](const auto& x, const auto& y) { return x.size() < y.size(); }));
}

absl::Status WeightUpdate::StageWhole(Open& open, size_t tensor) {
  Arriving& arriving = open.arriving[tensor];
  const TensorPlace& place = open.places[tensor];
  arriving.digest = arriving.digester.Finish();
  absl::Status staged = table_.Stage({.slot = place.slot,
                                      .first_row = place.first_row,
                                      .rows = place.rows,
                                      .data = arriving.bytes.data(),
                                      .dtype = open.manifest.tensors[tensor].dtype,
                                      .digest = arriving.digest});
  KeepMemory(open, std::exchange(arriving.bytes, {}));
  return staged;
}

absl::StatusOr<std::vector<int64_t>> WeightUpdate::Received(const WeightVersion& version) {
  absl::MutexLock lock(&mutex_);
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, GetUncommitted(version));
  return ReceivedOf(*open);
}

absl::Status WeightUpdate::Verify(const WeightVersion& version, std::span<const uint64_t> digests) {
  absl::MutexLock lock(&mutex_);
  LOCKSTEP_ASSIGN_OR_RETURN(Open * open, GetUncommitted(version));
  const std::vector<ManifestTensor>& tensors = open->manifest.tensors;
  if (digests.size() != tensors.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "digests: ", digests.size(), " values; want one for each of the manifest's ", tensors.size(), " tensors"));
  }
  std::vector<std::string> missing, wrong;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Arriving& arriving = open->arriving[i];
    if (arriving.received < open->places[i].bytes) {
      missing.push_back(
          absl::StrCat(tensors[i].name, " (", arriving.received, " of ", open->places[i].bytes, " bytes)"));
    } else if (arriving.digest != digests[i]) {
      wrong.push_back(absl::StrCat(tensors[i].name, " (digest ", absl::Hex(arriving.digest, absl::kZeroPad16),
                                   ", sent ", absl::Hex(digests[i], absl::kZeroPad16), ")"));
    } else if (arriving.non_finite > 0) {
      wrong.push_back(absl::StrCat(tensors[i].name, " (", arriving.non_finite, " values are NaN or infinite)"));
    }
  }
  const auto list = [](std::vector<std::string> names) {
    const size_t count = names.size();
    if (count > kShown) names.resize(kShown);
    return absl::StrCat(absl::StrJoin(names, ", "),
                        count > kShown ? absl::StrCat(" and ", count - kShown, " more") : "");
  };
  if (!missing.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(missing.size(), " tensors are not there yet: ", list(missing)));
  }
  // A tied head is the embedding's values under another name.
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t tied = table_.slots()[open->places[i].slot].tied_to;
    if (tied < 0) continue;
    for (size_t j = 0; j < tensors.size(); ++j) {
      if (static_cast<int64_t>(open->places[j].slot) == tied && open->arriving[i].digest != open->arriving[j].digest) {
        wrong.push_back(absl::StrCat(tensors[i].name, " (differs from ", tensors[j].name, ", to which it is tied)"));
      }
    }
  }
  if (!wrong.empty()) {
    Drop();
    const absl::Status restored = AwaitRestored("the old weights are not back yet");
    return absl::DataLossError(absl::StrCat("the update to ", VersionText(version), " was rolled back: ", list(wrong),
                                            restored.ok() ? "" : "; ", restored.message()));
  }
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.verify.compared"));
  LOCKSTEP_RETURN_IF_ERROR(table_.Finish());
  open->state = UpdateState::kVerified;
  StartLease(*open);  // what came before may have taken a while
  open->spare.clear();
  return absl::OkStatus();
}

absl::Status WeightUpdate::AwaitCommit(const WeightVersion& version, const CallLimit& limit) {
  const auto settled = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return open_ == nullptr || open_->version != version || open_->state != UpdateState::kCommitting;
  };
  if (limit.Await(mutex_, absl::Condition(&settled))) return absl::OkStatus();
  LOCKSTEP_RETURN_IF_ERROR(limit.CheckClient());
  return absl::UnavailableError(absl::StrCat("the update to ", VersionText(version), " is COMMITTING; try again"));
}

absl::Status WeightUpdate::Commit(const WeightVersion& version, const Install& install, const CallLimit& limit) {
  std::shared_ptr<const std::atomic<bool>> dropped;
  {
    absl::MutexLock lock(&mutex_);
    LOCKSTEP_RETURN_IF_ERROR(AwaitCommit(version, limit));
    if (version == serving_) return absl::OkStatus();
    LOCKSTEP_ASSIGN_OR_RETURN(Open * open, Get(version, UpdateState::kVerified));
    open->state = UpdateState::kCommitting;
    dropped = open->dropped;
  }
  absl::Status installed =
      install([&] { return *dropped || absl::Now() >= limit.deadline || !limit.CheckClient().ok(); });
  Failpoint("weights.commit.serving");
  absl::MutexLock lock(&mutex_);
  if (!installed.ok()) {
    open_->state = UpdateState::kVerified;
    StartLease(*open_);
    if (*dropped) Drop();
    return installed;
  }
  serving_ = version;
  open_.reset();
  if (shadow_ != nullptr) upkeep_ = Upkeep::kWrite;
  return absl::OkStatus();
}

absl::StatusOr<bool> WeightUpdate::Rollback(const WeightVersion& version) {
  absl::MutexLock lock(&mutex_);
  DropExpired();
  if (open_ == nullptr || open_->version != version) {
    // Dropped before: also by the lease, or by a call whose answer was lost.
    LOCKSTEP_RETURN_IF_ERROR(AwaitRestored("Rollback"));
    return false;
  }
  bool dropped = true;
  if (open_->state == UpdateState::kCommitting) {
    *open_->dropped = true;
    LOCKSTEP_RETURN_IF_ERROR(AwaitCommit(version, {.deadline = absl::Now() + kRestoreWait}));
    dropped = serving_ != version;
  } else {
    Drop();
  }
  LOCKSTEP_RETURN_IF_ERROR(AwaitRestored("Rollback"));
  return dropped;
}

UpdateStatus WeightUpdate::status() {
  absl::MutexLock lock(&mutex_);
  DropExpired();
  UpdateStatus status{.serving = serving_};
  if (upkeep_ != Upkeep::kNone) status.shadow = shadow_->progress();
  if (upkeep_ == Upkeep::kRestore) {
    status.state = UpdateState::kRestoring;
    status.open = undone_;
  }
  if (open_ == nullptr) return status;
  status.state = open_->state;
  status.open = open_->version;
  status.lease_left =
      std::max(absl::FromChrono(open_->expires - std::chrono::steady_clock::now()), absl::ZeroDuration());
  for (size_t i = 0; i < open_->places.size(); ++i) {
    status.received_bytes += open_->arriving[i].received;
    status.total_bytes += open_->places[i].bytes;
  }
  status.received_bytes += open_->arriving_bytes;
  return status;
}

WeightVersion WeightUpdate::serving() {
  absl::MutexLock lock(&mutex_);
  return serving_;
}

}  // namespace lockstep

#include "weights_sync/nccl_group.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

// A broadcast is enqueued within some 100 us, and a thread that sleeps takes as long to wake: spins at first. A wait
// that takes longer should cost nothing.
class Backoff {
 public:
  void Sleep(absl::Time deadline) {
    if (absl::Now() < spin_until_) {
      std::this_thread::yield();
      return;
    }
    absl::SleepFor(std::min(next_, deadline - absl::Now()));  // a negative time is none
    next_ = std::min(next_ * 2, absl::Milliseconds(1));
  }

 private:
  const absl::Time spin_until_ = absl::Now() + absl::Microseconds(300);
  absl::Duration next_ = absl::Microseconds(20);
};

}  // namespace

absl::Status NcclGroup::CheckArguments(const std::string& unique_id, int nranks, int rank) {
  if (unique_id.size() != nccl::kUniqueIdBytes)
    return absl::InvalidArgumentError(
        absl::StrCat("unique_id: ", unique_id.size(), " bytes; want ", nccl::kUniqueIdBytes));
  if (nranks < 1) return absl::InvalidArgumentError(absl::StrCat("nranks: ", nranks, "; want 1 or more"));
  if (rank < 0 || rank >= nranks)
    return absl::InvalidArgumentError(absl::StrCat("rank: ", rank, "; want 0 to ", nranks - 1));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<NcclGroup>> NcclGroup::Create(std::shared_ptr<NcclLibrary> library,
                                                             const std::string& unique_id, int nranks, int rank,
                                                             absl::Time deadline, int max_ctas,
                                                             std::function<bool()> cancelled) {
  LOCKSTEP_RETURN_IF_ERROR(CheckArguments(unique_id, nranks, rank));
  std::unique_ptr<NcclGroup> group(new NcclGroup(std::move(library), nranks, rank, std::move(cancelled)));
  nccl::UniqueId id;
  std::memcpy(id.internal, unique_id.data(), sizeof(id.internal));
  nccl::Config config;
  config.blocking = 0;
  if (max_ctas > 0) config.max_ctas = max_ctas;
  const nccl::Result result = group->library_->api().ncclCommInitRankConfig(&group->comm_, nranks, id, rank, &config);
  const absl::Status status = group->Finish(result, "the ranks to come together", deadline);
  if (!status.ok()) return status;
  group->outer_cancelled_ = nullptr;
  return group;
}

NcclGroup::~NcclGroup() {
  if (comm_ == nullptr) return;
  const absl::Time deadline = absl::Now() + kFinalizeWait;
  // An error has aborted it.
  if (!Finish(library_->api().ncclCommFinalize(comm_), "the communicator's end", deadline).ok()) return;
  library_->api().ncclCommDestroy(std::exchange(comm_, nullptr));
}

absl::Status NcclGroup::Broadcast(std::span<const Piece> pieces, int root, void* stream, absl::Time deadline) {
  if (root < 0 || root >= nranks_)
    return absl::InvalidArgumentError(absl::StrCat("root: ", root, "; want 0 to ", nranks_ - 1));
  int64_t bytes = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].bytes < 0 || (pieces[i].data == nullptr && pieces[i].bytes > 0)) {
      return absl::InvalidArgumentError(absl::StrCat("pieces[", i, "]: ", pieces[i].bytes, " bytes",
                                                     pieces[i].data == nullptr ? " at null" : "",
                                                     "; want 0 or more bytes of memory"));
    }
    bytes += pieces[i].bytes;
  }
  absl::Status status = Usable();
  if (!status.ok()) return status;
  if (IsCancelled()) return Fail(absl::CancelledError(Name("cancelled")));
  if (bytes == 0) return absl::OkStatus();

  const nccl::Api& api = library_->api();
  const std::string what = absl::StrCat("a broadcast of ", bytes, " bytes from rank ", root);
  nccl::Result result = api.ncclGroupStart();
  if (result != nccl::kSuccess) return Fail(library_->ToStatus(result, Name(what)));
  for (const Piece& piece : pieces) {
    if (piece.bytes == 0) continue;
    result = api.ncclBroadcast(piece.data, piece.data, piece.bytes, nccl::kUint8, root, comm_, stream);
    if (result != nccl::kSuccess && result != nccl::kInProgress) break;
    result = nccl::kSuccess;
  }
  // Also after an error: the group that is open belongs to the thread, not to the communicator.
  const nccl::Result end = api.ncclGroupEnd();
  return Finish(result == nccl::kSuccess ? end : result, what, deadline);
}

absl::Status NcclGroup::Wait(const std::function<absl::StatusOr<bool>()>& done, const std::string& what,
                             absl::Time deadline) {
  return Poll([&](nccl::Result) { return done(); }, what, deadline);
}

absl::Status NcclGroup::Poll(const std::function<absl::StatusOr<bool>(nccl::Result)>& done, const std::string& what,
                             absl::Time deadline) {
  absl::Status status = Usable();
  if (!status.ok()) return status;
  for (Backoff backoff;; backoff.Sleep(deadline)) {
    nccl::Result state = nccl::kSuccess;
    const nccl::Result asked = library_->api().ncclCommGetAsyncError(comm_, &state);
    if (asked != nccl::kSuccess) state = asked;
    // Before the state: what is complete stays so, whatever befell a peer afterwards.
    const absl::StatusOr<bool> is_done = done(state);
    if (!is_done.ok()) return Fail(is_done.status());
    if (*is_done) return absl::OkStatus();
    if (state != nccl::kSuccess && state != nccl::kInProgress) return Fail(library_->ToStatus(state, Name(what)));
    if (IsCancelled()) return Fail(absl::CancelledError(Name(absl::StrCat("cancelled while waiting for ", what))));
    if (absl::Now() >= deadline)
      return Fail(absl::DeadlineExceededError(Name(absl::StrCat("the deadline passed while waiting for ", what))));
  }
}

void NcclGroup::Abort() {
  if (comm_ == nullptr) return;
  if (cause_.empty()) cause_ = "Abort() was called";
  library_->api().ncclCommAbort(std::exchange(comm_, nullptr));
}

absl::Status NcclGroup::Usable() const {
  if (comm_ != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("the communicator is aborted: ", cause_));
}

absl::Status NcclGroup::Finish(nccl::Result result, const std::string& what, absl::Time deadline) {
  if (result != nccl::kSuccess && result != nccl::kInProgress) return Fail(library_->ToStatus(result, Name(what)));
  // Also after success: an older library may have left work to a thread of its own.
  return Poll([](nccl::Result state) { return state == nccl::kSuccess; }, what, deadline);
}

bool NcclGroup::IsCancelled() const {
  return cancelled_.load(std::memory_order_relaxed) || (outer_cancelled_ != nullptr && outer_cancelled_());
}

absl::Status NcclGroup::Fail(absl::Status status) {
  cause_ = std::string(status.message());
  Abort();
  return status;
}

std::string NcclGroup::Name(const std::string& what) const {
  return absl::StrCat("rank ", rank_, " of ", nranks_, ": ", what);
}

}  // namespace lockstep

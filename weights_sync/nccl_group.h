// One rank of one NCCL communicator, for broadcasts with a deadline. Whatever a peer does, no call here waits past it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "weights_sync/nccl_library.h"

namespace lockstep {

// For one thread at a time; Cancel() may come from any. Each call runs on the device that is current in its thread,
// which must be the one of Create().
//
// The communicator is non-blocking. ncclCommInitRankConfig, ncclGroupEnd, ncclCommFinalize, and outside of a group
// ncclBroadcast, may return ncclInProgress; until ncclCommGetAsyncError has left that value, the communicator takes
// no call but that one and ncclCommAbort. Here each is polled to its end by the call that began it, on the same thread:
// up to 2.26 NCCL keeps an open group's state in thread-local variables. ncclCommDestroy and ncclCommAbort wait for
// themselves and take the communicator with them, so it cannot be polled after either.
//
// The first error, deadline or cancellation aborts the communicator; from then on all is FAILED_PRECONDITION. Abort
// frees device memory and may so wait for other work on the device.
class NcclGroup {
 public:
  struct Piece {
    void* data;
    int64_t bytes;  // 0: nothing is sent; the ranks must agree in that as well
  };

  // INVALID_ARGUMENT, as Create would be.
  static absl::Status CheckArguments(const std::string& unique_id, int nranks, int rank);
  // Waits until all ranks have come. unique_id: NcclLibrary::UniqueId() of one of them. max_ctas: thread blocks that a
  // broadcast may take, the least of the ranks' counts; 0: NCCL's choice. cancelled: asked meanwhile; true ends
  // the wait.
  static absl::StatusOr<std::unique_ptr<NcclGroup>> Create(std::shared_ptr<NcclLibrary> library,
                                                           const std::string& unique_id, int nranks, int rank,
                                                           absl::Time deadline, int max_ctas = 0,
                                                           std::function<bool()> cancelled = nullptr);
  // A healthy communicator is finalised, for at most kFinalizeWait, and destroyed; any other has been aborted. Nothing
  // of it may be left on a stream: Wait() first.
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;

  // In place: what root holds comes to lie at the same piece of all ranks. OK means that all is enqueued on `stream`:
  // on a device the data is there when the stream has come so far, for which Wait() waits. The tests' library has no
  // streams (`stream` is null) and its OK means that the data is there.
  absl::Status Broadcast(std::span<const Piece> pieces, int root, void* stream, absl::Time deadline);
  // Until `done` (of an event behind a broadcast, say) is true, looking after the communicator meanwhile: a peer that
  // dies leaves a kernel on the stream that only an abort ends. `what` is for messages.
  absl::Status Wait(const std::function<absl::StatusOr<bool>()>& done, const std::string& what, absl::Time deadline);

  // Asked while a call waits: true has the effect of Cancel(). Null: nothing more.
  void set_cancelled(std::function<bool()> cancelled) { outer_cancelled_ = std::move(cancelled); }
  // The call in progress, or else the next one, aborts and is CANCELLED.
  void Cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  void Abort();

  bool healthy() const { return comm_ != nullptr; }
  // FAILED_PRECONDITION: it is aborted, and why.
  absl::Status Usable() const;
  int nranks() const { return nranks_; }
  int rank() const { return rank_; }

 private:
  NcclGroup(std::shared_ptr<NcclLibrary> library, int nranks, int rank, std::function<bool()> cancelled)
      : library_(std::move(library)), nranks_(nranks), rank_(rank), outer_cancelled_(std::move(cancelled)) {}

  // Until `done`, of the communicator's state, is true. Aborts if it does not come to that.
  absl::Status Poll(const std::function<absl::StatusOr<bool>(nccl::Result)>& done, const std::string& what,
                    absl::Time deadline);
  // Of a call that may have returned kInProgress: polls it to its end. Aborts if that is not success.
  absl::Status Finish(nccl::Result result, const std::string& what, absl::Time deadline);
  bool IsCancelled() const;
  absl::Status Fail(absl::Status status);  // aborts; returns `status`
  std::string Name(const std::string& what) const;

  const std::shared_ptr<NcclLibrary> library_;
  const int nranks_;
  const int rank_;
  std::function<bool()> outer_cancelled_;
  std::atomic<bool> cancelled_ = false;
  nccl::Comm comm_ = nullptr;  // null: aborted
  std::string cause_;          // why
};

inline constexpr absl::Duration kFinalizeWait = absl::Seconds(5);

}  // namespace lockstep

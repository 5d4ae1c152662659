// One worker's weight updates: the state machine of proto/lockstep/v1/weights.proto, without a transport or a model.
//
//   SERVING --Begin--> RECEIVING --Verify--> VERIFIED --Commit--> SERVING
//
// Bytes go to the table's second place; only Commit touches what serves, and only through `install`. With a table that
// has no second place (TensorTable::shadow) they go where what serves is: steps are held from the first of them on, and
// an update that is dropped is RESTORING until its shadow has put back what it overwrote. After Commit the shadow is
// written anew beside the steps, and the next Begin waits for that.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "weights_sync/call_limit.h"
#include "weights_sync/digest.h"
#include "weights_sync/manifest.h"
#include "weights_sync/step_gate.h"
#include "weights_sync/tensor_table.h"
#include "weights_sync/version.h"

namespace lockstep {

enum class UpdateState : uint8_t { kServing, kReceiving, kVerified, kCommitting, kRestoring };
const char* UpdateStateName(UpdateState state);

struct UpdateStatus {
  UpdateState state = UpdateState::kServing;
  WeightVersion serving;
  WeightVersion open;         // kServing: the default. kRestoring: that which is undone
  absl::Duration lease_left;  // kServing: zero
  int64_t received_bytes = 0;
  int64_t total_bytes = 0;
  // Of the shadow that is being written, or that restores; both zero: neither.
  TensorShadow::Progress shadow;
};

// What a transport that fills memory itself will bring; see WeightUpdate::BeginReceive.
struct Receive {
  std::vector<int64_t> tensors;  // indices into the manifest, ascending
  std::vector<int64_t> bytes;    // of every tensor of the manifest, as sent
  std::vector<DType> dtypes;     // likewise
  // Set when the update is dropped: the receive must end.
  std::shared_ptr<const std::atomic<bool>> dropped;
};

// Tensors of which a part has arrived wait in host memory; more than this many at once are refused.
inline constexpr size_t kMaxPartialTensors = 16;
// Tensors' memory that is kept for those that follow, until all have come.
inline constexpr size_t kMaxSpare = 2;
// A receive whose update was dropped ends soon, or at its deadline, and so much later at the latest: aborting its
// communicator may wait for other work on the device.
inline constexpr absl::Duration kDroppedReceiveWait = absl::Seconds(60);

// Thread-safe.
class WeightUpdate {
 public:
  // `table` and `gate` must outlive it. `gate`: of whoever computes with the table's weights; used, and needed, where
  // the table has a shadow. dropped_receive_wait: one that goes on after it ends the worker.
  WeightUpdate(TensorTable* table, WeightVersion serving, StepGate* gate,
               absl::Duration dropped_receive_wait = kDroppedReceiveWait);
  // Ends the shadow's work wherever it is.
  ~WeightUpdate();

  // Bytes received so far of each tensor. The same version and manifest as those of the open update: it goes on. Waits
  // for the shadow as long as `limit` says; then it is UNAVAILABLE and says how far that is, or CANCELLED.
  absl::StatusOr<std::vector<int64_t>> Begin(const WeightVersion& version, Manifest manifest, absl::Duration lease,
                                             const CallLimit& limit = {});
  // Bytes of tensor `tensor` of the open update's manifest, where its received bytes end. Bytes that are there already
  // (a stream that was sent again, also once the update is VERIFIED) are skipped.
  absl::Status Push(const WeightVersion& version, int64_t tensor, int64_t offset, std::span<const std::byte> data);
  absl::StatusOr<std::vector<int64_t>> Received(const WeightVersion& version);
  // For a transport that fills the table's inbox itself: `tensors` of the manifest (empty: all) will arrive, what has
  // arrived of them before does not count, and a VERIFIED update is RECEIVING again. Waits while another receive is
  // under way, as long as `limit` says. Then `ready` is asked; its error ends the call, and nothing is forgotten. The
  // caller alone may use the inbox until its EndReceive, which it owes, soon after limit.deadline at the latest.
  // UNIMPLEMENTED: the table has no inbox.
  absl::StatusOr<Receive> BeginReceive(
      const WeightVersion& version, std::vector<int64_t> tensors, const CallLimit& limit,
      const std::function<absl::Status()>& ready = [] { return absl::OkStatus(); });
  // The sender lives: renews the lease.
  absl::Status Renew(const WeightVersion& version);
  // What is in the inbox's buffer is about to be staged: holds the steps where that overwrites what serves.
  absl::Status BeforeStaging(const WeightVersion& version);
  // So many bytes of the receive under way have come, or are coming. Renews the lease.
  absl::Status NoteProgress(const WeightVersion& version, int64_t bytes);
  // `arrived`: OK once the inbox is idle and has all values: they count as received. Its error otherwise.
  absl::Status EndReceive(const WeightVersion& version, const absl::Status& arrived);
  TensorInbox* inbox() { return table_.inbox(); }

  // digests: by tensor, of the bytes as sent.
  absl::Status Verify(const WeightVersion& version, std::span<const uint64_t> digests);
  // Makes the second place serve, as `version`, and may take its time; its error says that nothing changed, or that the
  // device failed. `given_up`: until it begins with that, it asks whether it still should.
  using Install = std::function<absl::Status(const std::function<bool()>& given_up)>;
  // While `install` runs, of other calls only Rollback has an effect: it, and the limit, are what gives up. Its error
  // leaves the update VERIFIED. A version that already serves is OK without it; one that another call is committing
  // waits for that call, as long as `limit` says.
  absl::Status Commit(const WeightVersion& version, const Install& install, const CallLimit& limit = {});
  // Whether it was dropped; false: none was open, or its Commit could not be given up any more and has ended. Where it
  // overwrote what serves, that is restored on return.
  absl::StatusOr<bool> Rollback(const WeightVersion& version);
  // Drops an update whose lease is over. Call it now and then.
  void ExpireLease();

  UpdateStatus status();
  WeightVersion serving();

 private:
  using SteadyTime = std::chrono::steady_clock::time_point;  // of leases: the wall's clock may be set
  struct Arriving {
    std::vector<std::byte> bytes;  // at least its own, while it is partial
    int64_t received = 0;
    Digester digester;
    uint64_t digest = 0;  // once it is whole
    int64_t non_finite = 0;
  };
  struct Open {
    WeightVersion version;
    Manifest manifest;
    std::vector<TensorPlace> places;  // by tensor, as is the next
    std::vector<Arriving> arriving;
    // Memory of tensors that are staged, for those that follow: new memory costs as much as filling it.
    std::vector<std::vector<std::byte>> spare;
    UpdateState state = UpdateState::kReceiving;
    // By now, or, COMMITTING, as soon as its Commit gives up.
    std::shared_ptr<std::atomic<bool>> dropped = std::make_shared<std::atomic<bool>>(false);
    int64_t arriving_bytes = 0;  // of the receive under way
    bool holds = false;          // the steps, for it overwrites what serves
    absl::Duration lease;
    SteadyTime expires;
  };

  // The open update if it is `version`'s and its state is `want`; renews its lease.
  absl::StatusOr<Open*> Get(const WeightVersion& version, UpdateState want) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Likewise, RECEIVING or VERIFIED.
  absl::StatusOr<Open*> GetUncommitted(const WeightVersion& version) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Forgets the open update; a receive under way is told. What it overwrote is restored by the keeper: AwaitShadow.
  void Drop() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Before the first value that overwrites what serves.
  absl::Status Hold(Open& open) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether Begin may open it, as far as versions go.
  absl::Status CheckVersion(const WeightVersion& version) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Until the shadow neither restores nor is written. UNAVAILABLE, CANCELLED: not by `limit`. Its error: what serves is
  // lost.
  absl::Status AwaitShadow(const CallLimit& limit, const char* what) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Until what a dropped update overwrote is back, with a deadline of its own.
  absl::Status AwaitRestored(const char* what) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The shadow's thread.
  void Keep();
  absl::Status AwaitInbox(const CallLimit& limit, const char* what) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<Receive> OpenInbox(const WeightVersion& version, std::vector<int64_t> tensors)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Until no call commits `version`; UNAVAILABLE, CANCELLED: not by `limit`.
  absl::Status AwaitCommit(const WeightVersion& version, const CallLimit& limit) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // From now on.
  static void StartLease(Open& open);
  // At least as much.
  static std::vector<std::byte> TakeMemory(Open& open, int64_t bytes);
  static void KeepMemory(Open& open, std::vector<std::byte> memory);
  absl::Status StageWhole(Open& open, size_t tensor) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static std::vector<int64_t> ReceivedOf(const Open& open);

  enum class Upkeep : uint8_t { kNone, kRestore, kWrite };

  TensorTable& table_;
  TensorShadow* const shadow_;  // null: the table has a second place
  StepGate* const gate_;
  const absl::Duration dropped_receive_wait_;
  std::atomic<bool> ending_ = false;
  absl::Mutex mutex_;
  WeightVersion serving_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Open> open_ ABSL_GUARDED_BY(mutex_);
  bool receiving_ ABSL_GUARDED_BY(mutex_) = false;  // somebody owes an EndReceive
  absl::Time receive_deadline_ ABSL_GUARDED_BY(mutex_);
  std::vector<int64_t> inbox_tensors_ ABSL_GUARDED_BY(mutex_);
  Upkeep upkeep_ ABSL_GUARDED_BY(mutex_) = Upkeep::kNone;  // what the keeper does, or is to do
  WeightVersion undone_ ABSL_GUARDED_BY(mutex_);           // kRestore: the update's
  absl::Status lost_ ABSL_GUARDED_BY(mutex_);              // why no version serves any more
  std::thread keeper_;
};

}  // namespace lockstep

#include "weights_sync/nccl_receive.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/numerics.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "weights_sync/bucket_plan.h"

namespace lockstep {

void ReceiveSignal::Ready(int64_t buckets) {
  absl::MutexLock lock(&mutex_);
  ready_ = std::max(ready_, buckets);
}

void ReceiveSignal::Cancel(absl::Status why) {
  absl::MutexLock lock(&mutex_);
  if (status_.ok()) status_ = std::move(why);
}

int64_t ReceiveSignal::ready() {
  absl::MutexLock lock(&mutex_);
  return ready_;
}

absl::Status ReceiveSignal::status() {
  absl::MutexLock lock(&mutex_);
  return status_;
}

namespace {

absl::Status GroupIsOver() {
  return absl::CancelledError("the group was left, or joined in a later generation");
}

// One receive, while it has the inbox and the group.
class Receiver {
 public:
  Receiver(const NcclReceive& options, const Receive& receive, WeightUpdate& update, NcclGroups::Member& member,
           ReceiveSignal& signal)
      : options_(options),
        receive_(receive),
        update_(update),
        inbox_(*update.inbox()),
        member_(member),
        signal_(signal) {}

  absl::Status Run(NcclGroup& group, const std::function<void(int64_t)>& begun) {
    group.set_cancelled([this] { return !Check().ok(); });
    absl::Status status = ReceiveAll(group, begun);
    group.set_cancelled(nullptr);
    // Where the group was cancelled, why.
    if (absl::IsCancelled(status)) LOCKSTEP_RETURN_IF_ERROR(Check());
    return status;
  }

 private:
  absl::Status ReceiveAll(NcclGroup& group, const std::function<void(int64_t)>& begun) {
    LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<Bucket> buckets,
                              PlanBuckets(receive_.tensors, receive_.bytes, options_.bucket_bytes));
    LOCKSTEP_RETURN_IF_ERROR(inbox_.UseOnThisThread());
    const int64_t count = static_cast<int64_t>(buckets.size());
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.receive.begun"));
    begun(count);
    int64_t bytes = 0;
    for (int64_t b = 0; b < count; ++b) {
      const auto announced = [&]() -> absl::StatusOr<bool> { return signal_.ready() > b; };
      LOCKSTEP_RETURN_IF_ERROR(group.Wait(
          announced, absl::StrCat("the sender to be ready with bucket ", b, " of ", count), options_.deadline));
      LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.receive.bucket"));
      const int which = static_cast<int>(b % 2);
      LOCKSTEP_RETURN_IF_ERROR(inbox_.Acquire(which));
      std::vector<NcclGroup::Piece> pieces;
      for (const BucketPiece& piece : buckets[b]) {
        pieces.push_back({.data = inbox_.buffer(which) + piece.bucket_offset, .bytes = piece.bytes});
        bytes += piece.bytes;
      }
      LOCKSTEP_RETURN_IF_ERROR(group.Broadcast(pieces, member_.join.root, inbox_.stream(), options_.deadline));
      LOCKSTEP_RETURN_IF_ERROR(update_.BeforeStaging(options_.version));
      LOCKSTEP_RETURN_IF_ERROR(inbox_.Stage(which, Arrived(buckets[b])));
      LOCKSTEP_RETURN_IF_ERROR(update_.NoteProgress(options_.version, bytes));
      LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.receive.converted"));
    }
    return group.Wait([&] { return inbox_.Idle(); }, "the last bytes", options_.deadline);
  }

  // What may end a receive.
  absl::Status Check() {
    LOCKSTEP_RETURN_IF_ERROR(signal_.status());
    if (member_.replaced) return GroupIsOver();
    if (*receive_.dropped) return absl::CancelledError("the update was rolled back, or its lease expired");
    return absl::OkStatus();
  }

  std::vector<ArrivedPiece> Arrived(const Bucket& bucket) const {
    std::vector<ArrivedPiece> arrived;
    for (const BucketPiece& piece : bucket) {
      const auto at = std::lower_bound(receive_.tensors.begin(), receive_.tensors.end(), piece.tensor);
      const int64_t size = DTypeBytes(receive_.dtypes[piece.tensor]);
      arrived.push_back({.tensor = static_cast<size_t>(at - receive_.tensors.begin()),
                         .index = piece.tensor_offset / size,
                         .count = piece.bytes / size,
                         .offset = piece.bucket_offset});
    }
    return arrived;
  }

  const NcclReceive& options_;
  const Receive& receive_;
  WeightUpdate& update_;
  TensorInbox& inbox_;
  NcclGroups::Member& member_;
  ReceiveSignal& signal_;
};

}  // namespace

absl::Status ReceiveOverNccl(const NcclReceive& options, WeightUpdate& update, NcclGroups::Member& member,
                             ReceiveSignal& signal, const std::function<void(int64_t)>& begun) {
  // What refuses it is found before what came earlier is forgotten for it.
  LOCKSTEP_RETURN_IF_ERROR(PlanBuckets({}, {}, options.bucket_bytes).status());
  if (update.inbox() != nullptr && options.bucket_bytes > update.inbox()->buffer_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("bucket_bytes: ", options.bucket_bytes, "; want at most ",
                                                   update.inbox()->buffer_bytes(), ", as Join's answer says"));
  }
  const auto ready = [&]() -> absl::Status {
    absl::MutexLock lock(&member.use);
    // Of a group that has failed before: the sender must not take this worker for ready.
    return member.group == nullptr ? GroupIsOver() : member.group->Usable();
  };
  const CallLimit limit = {.deadline = options.deadline, .cancelled = [&] { return !signal.status().ok(); }};
  const absl::StatusOr<Receive> receive = update.BeginReceive(options.version, options.tensors, limit, ready);
  if (absl::IsCancelled(receive.status())) LOCKSTEP_RETURN_IF_ERROR(signal.status());
  LOCKSTEP_RETURN_IF_ERROR(receive.status());
  absl::Status arrived;
  {
    absl::MutexLock lock(&member.use);
    arrived = member.group == nullptr ? GroupIsOver()
                                      : Receiver(options, *receive, update, member, signal).Run(*member.group, begun);
    // Nothing must be written into the inbox any more.
    if (!arrived.ok() && member.group != nullptr) member.group->Abort();
  }
  const absl::Status ended = update.EndReceive(options.version, arrived);
  if (!arrived.ok()) return arrived;
  LOCKSTEP_RETURN_IF_ERROR(ended);
  return FailpointStatus("weights.receive.arrived");
}

}  // namespace lockstep

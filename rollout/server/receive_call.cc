#include "rollout/server/receive_call.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "rollout/server/check_range.h"
#include "rollout/server/stream_reactor.h"
#include "rollout/server/unknown_fields.h"
#include "rollout/server/weight_fields.h"
#include "weights_sync/bucket_plan.h"

namespace lockstep {
namespace {

// Without a deadline of the client's.
constexpr absl::Duration kLongest = absl::Hours(1);

}  // namespace

ReceiveCall::ReceiveCall(WeightUpdate* update, NcclGroups* groups, absl::Time deadline)
    : update_(*update), groups_(*groups) {
  receive_.deadline = std::min(deadline, absl::Now() + kLongest);
  StartRead(&request_);
}

ReceiveCall::~ReceiveCall() {
  if (thread_.joinable()) thread_.join();
}

void ReceiveCall::OnReadDone(bool ok) {
  if (!ok) {
    // The sender has no more to say, which ends the call only if it never said anything.
    if (!started_) End(absl::InvalidArgumentError("version: the stream ended before its first message"));
    return;
  }
  if (!started_) {
    if (const absl::Status status = Start(); !status.ok()) {
      started_ = true;
      End(status);
      return;
    }
    started_ = true;
    signal_.Ready(request_.ready_buckets());
    thread_ = std::thread([this] { End(Run()); });
  } else if (request_.has_version() || !request_.group().empty() || request_.tensors_size() > 0) {
    signal_.Cancel(
        absl::InvalidArgumentError("version, group, tensors: set again; want them in the first message only"));
  } else {
    signal_.Ready(request_.ready_buckets());
    // If the update is gone, the receive ends for that.
    (void)update_.Renew(receive_.version);
  }
  request_.Clear();
  absl::MutexLock lock(&mutex_);
  if (!ended_) StartRead(&request_);
}

void ReceiveCall::End(const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    ended_ = true;
  }
  Finish(ToGrpc(status));
}

absl::Status ReceiveCall::Start() {
  LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(request_));
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.receive.before"));
  LOCKSTEP_ASSIGN_OR_RETURN(receive_.version, VersionOf(request_.has_version(), request_.version()));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("bucket_bytes", request_.bucket_bytes(), kBucketAlign, kMaxBucketBytes));
  receive_.tensors.assign(request_.tensors().begin(), request_.tensors().end());
  receive_.bucket_bytes = request_.bucket_bytes();
  LOCKSTEP_ASSIGN_OR_RETURN(member_, groups_.Find(request_.group(), request_.generation()));
  return absl::OkStatus();
}

absl::Status ReceiveCall::Run() {
  absl::Status status = ReceiveOverNccl(receive_, update_, *member_, signal_, [this](int64_t buckets) {
    response_.set_buckets(buckets);
    {
      absl::MutexLock lock(&mutex_);
      writing_ = true;
    }
    StartWrite(&response_);
  });
  // The write must have ended before the call may; it does, with the connection at the latest.
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(
      +[](bool* writing) { return !*writing; }, &writing_));
  return status;
}

void ReceiveCall::OnWriteDone(bool) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
}

void ReceiveCall::OnCancel() {
  signal_.Cancel(absl::CancelledError("the sender is gone, or cancelled the call"));
}

}  // namespace lockstep

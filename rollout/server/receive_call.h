// One Receive call: reads what the sender announces while a thread of its own takes the broadcasts.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "lockstep/v1/weights.grpc.pb.h"
#include "weights_sync/nccl_groups.h"
#include "weights_sync/nccl_receive.h"
#include "weights_sync/update.h"

namespace lockstep {

// Owns itself until gRPC is done with the call, which is not before the thread has ended.
class ReceiveCall final : public grpc::ServerBidiReactor<v1::ReceiveRequest, v1::ReceiveResponse> {
 public:
  // All must outlive the call. `deadline`: the client's.
  ReceiveCall(WeightUpdate* update, NcclGroups* groups, absl::Time deadline);
  ~ReceiveCall() override;

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  // Of the first message.
  absl::Status Start();
  absl::Status Run();
  // The call's status; after it nothing more may be read.
  void End(const absl::Status& status);

  WeightUpdate& update_;
  NcclGroups& groups_;
  v1::ReceiveRequest request_;
  v1::ReceiveResponse response_;
  bool started_ = false;  // of gRPC's reads, one at a time
  NcclReceive receive_;
  std::shared_ptr<NcclGroups::Member> member_;
  ReceiveSignal signal_;
  std::thread thread_;
  absl::Mutex mutex_;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace lockstep

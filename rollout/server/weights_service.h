// lockstep.v1.Weights over a WeightUpdate: converts, checks, and leaves the rest to it and to the worker.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

#include "lockstep/v1/weights.grpc.pb.h"
#include "rollout/server/credentials.h"
#include "rollout/worker/make_worker.h"
#include "weights_sync/nccl_groups.h"
#include "weights_sync/update.h"

namespace lockstep {

// Calls wait on the worker's step boundaries and on each other: a synchronous service, on a port of few calls. But
// Receive, which reads and works at once.
class WeightsService final : public v1::Weights::WithCallbackMethod_Receive<v1::Weights::Service> {
 public:
  // `model` must outlive it, and have tensors and a control. nccl_library: empty for the loader's libnccl.so.2.
  WeightsService(ServingModel* model, const std::string& nccl_library, PortToken token);

  // Frees what an abandoned update holds. Call it now and then.
  void ExpireLease() { update_.ExpireLease(); }

  grpc::Status Begin(grpc::ServerContext* context, const v1::BeginRequest* request,
                     v1::BeginResponse* response) override;
  grpc::Status Push(grpc::ServerContext* context, grpc::ServerReader<v1::PushRequest>* reader,
                    v1::PushResponse* response) override;
  grpc::Status Join(grpc::ServerContext* context, const v1::JoinRequest* request, v1::JoinResponse* response) override;
  grpc::ServerBidiReactor<v1::ReceiveRequest, v1::ReceiveResponse>* Receive(
      grpc::CallbackServerContext* context) override;
  grpc::Status Leave(grpc::ServerContext* context, const v1::LeaveRequest* request,
                     v1::LeaveResponse* response) override;
  grpc::Status Verify(grpc::ServerContext* context, const v1::VerifyRequest* request,
                      v1::VerifyResponse* response) override;
  grpc::Status Commit(grpc::ServerContext* context, const v1::CommitRequest* request,
                      v1::CommitResponse* response) override;
  grpc::Status Rollback(grpc::ServerContext* context, const v1::RollbackRequest* request,
                        v1::RollbackResponse* response) override;
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* request,
                         v1::GetStatusResponse* response) override;
  grpc::Status GetDigests(grpc::ServerContext* context, const v1::GetDigestsRequest* request,
                          v1::GetDigestsResponse* response) override;

 private:
  ServingModel& model_;
  WeightUpdate update_;
  NcclGroups groups_;
  const PortToken token_;
};

}  // namespace lockstep

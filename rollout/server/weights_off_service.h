// lockstep.v1.Weights of a worker that takes no weights: says so, where gRPC alone would say UNIMPLEMENTED and no more.
#pragma once

#include <grpcpp/grpcpp.h>

#include <utility>

#include "absl/status/status.h"
#include "lockstep/v1/weights.grpc.pb.h"
#include "rollout/server/credentials.h"
#include "rollout/server/stream_reactor.h"

namespace lockstep {

class WeightsOffService final : public v1::Weights::Service {
 public:
  explicit WeightsOffService(PortToken token) : token_(std::move(token)) {}

  grpc::Status Begin(grpc::ServerContext* context, const v1::BeginRequest*, v1::BeginResponse*) override {
    return Off(*context);
  }
  grpc::Status Push(grpc::ServerContext* context, grpc::ServerReader<v1::PushRequest>*, v1::PushResponse*) override {
    return Off(*context);
  }
  grpc::Status Join(grpc::ServerContext* context, const v1::JoinRequest*, v1::JoinResponse*) override {
    return Off(*context);
  }
  grpc::Status Receive(grpc::ServerContext* context,
                       grpc::ServerReaderWriter<v1::ReceiveResponse, v1::ReceiveRequest>*) override {
    return Off(*context);
  }
  grpc::Status Leave(grpc::ServerContext* context, const v1::LeaveRequest*, v1::LeaveResponse*) override {
    return Off(*context);
  }
  grpc::Status Verify(grpc::ServerContext* context, const v1::VerifyRequest*, v1::VerifyResponse*) override {
    return Off(*context);
  }
  grpc::Status Commit(grpc::ServerContext* context, const v1::CommitRequest*, v1::CommitResponse*) override {
    return Off(*context);
  }
  grpc::Status Rollback(grpc::ServerContext* context, const v1::RollbackRequest*, v1::RollbackResponse*) override {
    return Off(*context);
  }
  grpc::Status GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest*, v1::GetStatusResponse*) override {
    return Off(*context);
  }
  grpc::Status GetDigests(grpc::ServerContext* context, const v1::GetDigestsRequest*,
                          v1::GetDigestsResponse*) override {
    return Off(*context);
  }

 private:
  grpc::Status Off(const grpc::ServerContext& context) const {
    absl::Status status = token_.Authorise(context);
    if (status.ok()) {
      status = absl::FailedPreconditionError(
          "this worker takes no weights and knows no digests: --weights_receive=off; want staged or direct");
    }
    return ToGrpc(status);
  }

  const PortToken token_;
};

}  // namespace lockstep

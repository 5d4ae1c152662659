// lockstep.v1.Rollout on gRPC's callback API: validates, registers, starts; streams deliver.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "lockstep/v1/rollout.grpc.pb.h"
#include "rollout/server/convert.h"
#include "rollout/server/credentials.h"
#include "rollout/server/open_streams.h"
#include "rollout/server/request_registry.h"
#include "rollout/server/request_starter.h"
#include "rollout/worker/make_worker.h"

namespace lockstep {

class RolloutService final : public v1::Rollout::CallbackService {
 public:
  // All must outlive the service. `backend` is for GetInfo.
  RolloutService(const ServingModel* model, const ServiceLimits& limits, std::string backend, RequestRegistry* registry,
                 RequestStarter* starter, PortToken token);

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::ScoreResponse>* Score(grpc::CallbackServerContext* context,
                                                     const v1::ScoreRequest* request) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* GetInfo(grpc::CallbackServerContext* context, const v1::GetInfoRequest* request,
                                    v1::GetInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override;

  // Generate's and Score's.
  const OpenStreams& streams() const { return streams_; }

 private:
  template <class Response>
  grpc::ServerWriteReactor<Response>* StartStream(grpc::CallbackServerContext* context,
                                                  absl::StatusOr<ConvertedRequest> converted);
  grpc::ServerWriteReactor<v1::GenerateResponse>* StartAttach(grpc::CallbackServerContext* context,
                                                              const v1::GenerateRequest& request);
  absl::Status HandleAbort(const v1::AbortRequest& request, v1::AbortResponse* response);

  const ServingModel* const model_;
  RequestContext request_context_;
  const std::string backend_;
  RequestRegistry* const registry_;
  RequestStarter* const starter_;
  const PortToken token_;
  OpenStreams streams_;
};

}  // namespace lockstep

// lockstep.v1.Control.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>

#include "absl/time/time.h"
#include "lockstep/v1/control.grpc.pb.h"
#include "rollout/server/credentials.h"
#include "rollout/worker/request.h"

namespace lockstep {

class ControlService final : public v1::Control::Service {
 public:
  // `drain(deadline)` refuses new requests and returns when none are in flight; `control` must outlive it.
  ControlService(WorkerControl* control, std::function<void(absl::Time)> drain, PortToken token)
      : control_(*control), drain_(std::move(drain)), token_(std::move(token)) {}

  grpc::Status Pause(grpc::ServerContext* context, const v1::PauseRequest* request,
                     v1::PauseResponse* response) override;
  grpc::Status Resume(grpc::ServerContext* context, const v1::ResumeRequest* request,
                      v1::ResumeResponse* response) override;
  grpc::Status Drain(grpc::ServerContext* context, const v1::DrainRequest* request,
                     v1::DrainResponse* response) override;

 private:
  WorkerControl& control_;
  const std::function<void(absl::Time)> drain_;
  const PortToken token_;
};

}  // namespace lockstep

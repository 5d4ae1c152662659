#include "rollout/server/control_service.h"

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "rollout/server/check_range.h"
#include "rollout/server/stream_reactor.h"
#include "rollout/server/unknown_fields.h"

namespace lockstep {
namespace {

constexpr int64_t kMaxTimeoutMs = 3'600'000;

absl::StatusOr<PauseMode> ModeOf(v1::PauseMode mode) {
  switch (mode) {
    case v1::PAUSE_MODE_UNSPECIFIED:
    case v1::PAUSE_MODE_KEEP:
      return PauseMode::kKeep;
    case v1::PAUSE_MODE_ABORT:
      return PauseMode::kAbort;
    case v1::PAUSE_MODE_FINISH:
      return PauseMode::kFinish;
    default:
      return absl::InvalidArgumentError(absl::StrCat("mode: ", static_cast<int>(mode), "; want KEEP, ABORT or FINISH"));
  }
}

}  // namespace

grpc::Status ControlService::Pause(grpc::ServerContext* context, const v1::PauseRequest* request,
                                   v1::PauseResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_ASSIGN_OR_RETURN(const PauseMode mode, ModeOf(request->mode()));
    if (mode != PauseMode::kFinish && request->timeout_ms() != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("timeout_ms: ", request->timeout_ms(), "; want 0, or mode FINISH, which alone waits"));
    }
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("timeout_ms", request->timeout_ms(), 0, kMaxTimeoutMs));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("control.pause.before"));
    LOCKSTEP_ASSIGN_OR_RETURN(const int64_t in_flight,
                              control_.Pause(mode, absl::Now() + absl::Milliseconds(request->timeout_ms()),
                                             [&] { return context->IsCancelled(); }));
    response->set_in_flight(in_flight);
    return FailpointStatus("control.pause.answer");
  };
  return ToGrpc(run());
}

grpc::Status ControlService::Resume(grpc::ServerContext* context, const v1::ResumeRequest* request,
                                    v1::ResumeResponse*) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("control.resume.before"));
    control_.Resume();
    return FailpointStatus("control.resume.answer");
  };
  return ToGrpc(run());
}

grpc::Status ControlService::Drain(grpc::ServerContext* context, const v1::DrainRequest* request, v1::DrainResponse*) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("timeout_ms", request->timeout_ms(), 0, kMaxTimeoutMs));
    drain_(absl::Now() + absl::Milliseconds(request->timeout_ms()));
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

}  // namespace lockstep

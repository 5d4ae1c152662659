// GetInfo's answer, but for the weight version: what is constant about a worker.
#pragma once

#include <string>

#include "lockstep/v1/rollout.pb.h"
#include "rollout/server/convert.h"
#include "rollout/worker/make_worker.h"

namespace lockstep {

void FillInfo(const ServingModel& model, const RequestContext& context, const std::string& backend,
              v1::GetInfoResponse* response);

v1::WeightsReceive ProtoReceive(WeightsReceive receive);

// "lockstep-worker 0.1.0 (commit, compiler)".
std::string VersionLine();

}  // namespace lockstep

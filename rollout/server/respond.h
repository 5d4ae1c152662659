// From results to messages.
#pragma once

#include "lockstep/v1/rollout.pb.h"
#include "rollout/server/request_state.h"
#include "rollout/worker/request.h"

namespace lockstep {

// `*response` is empty. ResultPiece's vectors are consumed.
void FillResponse(const RequestInfo& info, ResultPiece& piece, v1::GenerateResponse* response);
void FillResponse(const RequestInfo& info, ResultPiece& piece, v1::ScoreResponse* response);

void FillWeightVersion(const WeightVersion& version, v1::WeightVersion* out);

}  // namespace lockstep

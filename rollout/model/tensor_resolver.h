// Finds in a checkpoint the tensors that a spec needs, and says everything that is wrong in one message.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "rollout/model/checkpoint.h"
#include "rollout/model/spec.h"

namespace lockstep {

// Canonical name -> the tensors it is read from: one, or parts to stack along the first dimension. A tied head is
// absent.
using ResolvedTensors = std::map<std::string, std::vector<CheckpointTensor>>;

// INVALID_ARGUMENT lists missing, unexpected, ambiguous (stored under two names), misshapen and wrongly typed tensors,
// the first 20 of each, and a tied head whose bytes are not the embedding's.
absl::StatusOr<ResolvedTensors> ResolveTensors(const ModelSpec& spec, const Checkpoint& checkpoint);

}  // namespace lockstep

// From a client's message to what the worker runs: every field checked, defaults filled in. Pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lockstep/v1/rollout.pb.h"
#include "rollout/server/limits.h"
#include "rollout/server/request_state.h"
#include "rollout/worker/request.h"

namespace lockstep {

// What requests are checked against.
struct RequestContext {
  int64_t vocab_size = 0;
  int64_t max_sequence_tokens = 0;
  std::vector<int32_t> eos_token_ids;
  bool has_tokenizer = false;
  ServiceLimits limits;
};

// Used where the request leaves them out.
struct DrawnDefaults {
  std::string request_id;
  uint64_t seed = 0;
};

struct ConvertedRequest {
  RequestSpec spec;
  RequestInfo info;  // worker_id not yet set
  std::optional<WeightVersion> min_weight_version;
  int64_t stream_interval = 0;
};

struct ConvertedAttach {
  std::string request_id;
  std::vector<std::pair<int32_t, int64_t>> offsets;  // (sample_index as the client counts, offset)
  int64_t prompt_position = 0;
  int64_t stream_interval = 0;
};

// INVALID_ARGUMENT names the field, the value and what would be right; FAILED_PRECONDITION what the checkpoint lacks.
absl::StatusOr<ConvertedRequest> ConvertGenerate(const v1::GenerateRequest& request, const RequestContext& context,
                                                 const DrawnDefaults& drawn);
absl::StatusOr<ConvertedRequest> ConvertScore(const v1::ScoreRequest& request, const RequestContext& context,
                                              const DrawnDefaults& drawn);
absl::StatusOr<ConvertedAttach> ConvertAttach(const v1::GenerateRequest& request);
absl::Status ValidateAbort(const v1::AbortRequest& request);

// The samples of an Attach in the request's own numbering, or INVALID_ARGUMENT for one it does not have.
absl::StatusOr<AttachPoint> ResolveAttach(const ConvertedAttach& attach, const RequestInfo& info);

}  // namespace lockstep

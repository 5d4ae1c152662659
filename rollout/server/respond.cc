#include "rollout/server/respond.h"

#include <vector>

namespace lockstep {
namespace {

constexpr size_t kMaxAbortMessage = 1024;

template <class T>
void Copy(const std::vector<T>& from, google::protobuf::RepeatedField<T>* to) {
  to->Assign(from.begin(), from.end());
}

void FillLogprobs(const LogprobLayout& layout, const LogprobColumns& columns, v1::Logprobs* out) {
  Copy(columns.raw, out->mutable_raw());
  Copy(columns.temperature, out->mutable_temperature());
  Copy(columns.processed, out->mutable_processed());
  out->set_top_k(layout.top_k);
  Copy(columns.top_raw_ids, out->mutable_top_raw_ids());
  Copy(columns.top_raw, out->mutable_top_raw_logprobs());
  Copy(columns.top_temperature_ids, out->mutable_top_temperature_ids());
  Copy(columns.top_temperature, out->mutable_top_temperature_logprobs());
  Copy(columns.top_processed_ids, out->mutable_top_processed_ids());
  Copy(columns.top_processed, out->mutable_top_processed_logprobs());
  Copy(columns.kept_counts, out->mutable_kept_counts());
  Copy(columns.kept_ids, out->mutable_kept_ids());
}

v1::LengthReason ToProto(LengthReason reason) {
  switch (reason) {
    case LengthReason::kMaxTokens:
      return v1::LENGTH_REASON_MAX_TOKENS;
    case LengthReason::kContext:
      return v1::LENGTH_REASON_CONTEXT;
  }
  return v1::LENGTH_REASON_UNSPECIFIED;
}

v1::AbortReason ToProto(AbortReason reason) {
  switch (reason) {
    case AbortReason::kClient:
      return v1::ABORT_REASON_CLIENT;
    case AbortReason::kCancelled:
      return v1::ABORT_REASON_CANCELLED;
    case AbortReason::kDeadline:
      return v1::ABORT_REASON_DEADLINE;
    case AbortReason::kTimeBudget:
      return v1::ABORT_REASON_TIME_BUDGET;
    case AbortReason::kShutdown:
      return v1::ABORT_REASON_SHUTDOWN;
    case AbortReason::kInternal:
      return v1::ABORT_REASON_INTERNAL;
    case AbortReason::kWeightUpdate:
      return v1::ABORT_REASON_WEIGHT_UPDATE;
    case AbortReason::kBufferLimit:
      return v1::ABORT_REASON_BUFFER_LIMIT;
  }
  return v1::ABORT_REASON_UNSPECIFIED;
}

void FillStop(const StopMatch& stop, v1::MatchedStop* out) {
  switch (stop.kind) {
    case StopKind::kEos:
      out->set_kind(v1::STOP_KIND_EOS);
      break;
    case StopKind::kTokenId:
      out->set_kind(v1::STOP_KIND_TOKEN_ID);
      break;
    case StopKind::kTokenSequence:
      out->set_kind(v1::STOP_KIND_TOKEN_SEQUENCE);
      break;
    case StopKind::kString:
      out->set_kind(v1::STOP_KIND_STRING);
      break;
  }
  out->set_token_id(stop.token_id);
  out->set_index(stop.index);
  out->set_last_token_text_offset(stop.last_token_text_offset);
}

void FillDone(const SampleResult& result, int64_t end_offset, v1::Done* out) {
  switch (result.finish) {
    case FinishKind::kStop:
      out->set_finish_reason(v1::FINISH_REASON_STOP);
      FillStop(result.stop, out->mutable_matched_stop());
      break;
    case FinishKind::kLength:
      out->set_finish_reason(v1::FINISH_REASON_LENGTH);
      out->set_length_reason(ToProto(result.length));
      break;
    case FinishKind::kAborted:
      out->set_finish_reason(v1::FINISH_REASON_ABORTED);
      out->set_abort_reason(ToProto(result.abort));
      out->set_abort_message(result.abort_message.substr(0, kMaxAbortMessage));
      break;
    case FinishKind::kScored:
      out->set_finish_reason(v1::FINISH_REASON_SCORED);
      break;
  }
  const auto fill = [](const VersionSpan& span, v1::VersionSpan* to) {
    FillWeightVersion(span.weights, to->mutable_weight_version());
    FillWeightVersion(span.state, to->mutable_state_version());
    to->set_begin(span.begin);
    to->set_end(span.end);
  };
  for (const VersionSpan& span : result.spans) fill(span, out->add_version_spans());
  if (result.prompt_span) fill(*result.prompt_span, out->mutable_prompt_span());
  v1::Counters* counters = out->mutable_counters();
  counters->set_preemptions(result.counters.preemptions);
  counters->set_cached_prompt_tokens(result.counters.cached_prompt_tokens);
  counters->set_queue_ms(absl::ToDoubleMilliseconds(result.counters.queue_time));
  counters->set_prefill_ms(absl::ToDoubleMilliseconds(result.counters.prefill_time));
  counters->set_decode_ms(absl::ToDoubleMilliseconds(result.counters.decode_time));
  out->set_end_offset(end_offset);
}

}  // namespace

void FillWeightVersion(const WeightVersion& version, v1::WeightVersion* out) {
  out->set_epoch(version.epoch);
  out->set_step(version.step);
}

void FillResponse(const RequestInfo& info, ResultPiece& piece, v1::GenerateResponse* response) {
  response->set_sample_index(info.first_sample_index + piece.sample);
  response->set_offset(piece.accepted || piece.prompt ? info.first_offset : piece.slice.offset);
  if (piece.accepted) {
    v1::Accepted* accepted = response->mutable_accepted();
    accepted->set_request_id(info.request_id);
    accepted->set_seed(info.seed);
    accepted->set_max_tokens(info.max_tokens);
    return;
  }
  if (piece.prompt) {
    response->mutable_prompt_logprobs()->set_begin(piece.slice.offset);
    FillLogprobs(info.prompt_layout, piece.slice.logprobs, response->mutable_prompt_logprobs()->mutable_logprobs());
    return;
  }
  Copy(piece.slice.tokens, response->mutable_token_ids());
  if (!info.layout.empty() && piece.slice.rows > 0)
    FillLogprobs(info.layout, piece.slice.logprobs, response->mutable_logprobs());
  if (piece.done) FillDone(*piece.done, piece.slice.end(), response->mutable_done());
}

void FillResponse(const RequestInfo& info, ResultPiece& piece, v1::ScoreResponse* response) {
  if (piece.accepted) {
    response->set_offset(info.prompt_range.begin);
    response->mutable_accepted()->set_request_id(info.request_id);
    return;
  }
  if (piece.prompt) {
    response->set_offset(piece.slice.offset);
    FillLogprobs(info.prompt_layout, piece.slice.logprobs, response->mutable_logprobs());
  }
  if (piece.done) {
    // A score's samples hold no tokens; its end is that of the positions.
    response->set_offset(piece.prompt_end);
    FillDone(*piece.done, piece.prompt_end, response->mutable_done());
  }
}

}  // namespace lockstep

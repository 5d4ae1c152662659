#include "rollout/server/rollout_service.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"
#include "rollout/server/info.h"
#include "rollout/server/request_ids.h"
#include "rollout/server/respond.h"
#include "rollout/server/stream_reactor.h"
#include "rollout/server/unknown_fields.h"

namespace lockstep {
namespace {

// A stream that never begins.
template <class Response>
class FailedStream final : public grpc::ServerWriteReactor<Response> {
 public:
  FailedStream(grpc::CallbackServerContext* context, const absl::Status& status) {
    AddRetryHint(context, RetryAfterMs(status));
    this->Finish(ToGrpc(status));
  }
  void OnDone() override { delete this; }
};

grpc::ServerUnaryReactor* FinishUnary(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

// Early enough that the partial result reaches the client before it gives up; rollout.proto documents the numbers.
absl::Time EffectiveDeadline(const grpc::CallbackServerContext& context, absl::Time now) {
  if (context.deadline() == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  const absl::Time deadline = absl::FromChrono(context.deadline());
  return deadline - std::clamp((deadline - now) / 10, absl::ZeroDuration(), absl::Milliseconds(200));
}

}  // namespace

RolloutService::RolloutService(const ServingModel* model, const ServiceLimits& limits, std::string backend,
                               RequestRegistry* registry, RequestStarter* starter, PortToken token)
    : model_(model),
      request_context_{.vocab_size = model->spec.vocab_size,
                       .max_sequence_tokens = model->max_sequence_tokens,
                       .eos_token_ids = model->spec.eos_token_ids,
                       .has_tokenizer = model->has_tokenizer,
                       .limits = limits},
      backend_(std::move(backend)),
      registry_(registry),
      starter_(starter),
      token_(std::move(token)) {
  ServiceLimits& resolved = request_context_.limits;
  const int64_t fits = std::max<int64_t>(model->max_sequence_tokens - 1, 1);
  resolved.max_prompt_tokens = resolved.max_prompt_tokens == 0 ? fits : std::min(resolved.max_prompt_tokens, fits);
}

template <class Response>
grpc::ServerWriteReactor<Response>* RolloutService::StartStream(grpc::CallbackServerContext* context,
                                                                absl::StatusOr<ConvertedRequest> converted) {
  if (!converted.ok()) return new FailedStream<Response>(context, converted.status());
  if (starter_->draining()) return new FailedStream<Response>(context, DrainingError());
  const absl::Time now = absl::Now();
  const absl::Time deadline = EffectiveDeadline(*context, now);
  auto state = registry_->Add(std::move(converted->info));
  if (!state.ok()) return new FailedStream<Response>(context, state.status());
  converted->spec.request_id = (*state)->info().worker_id;

  auto reactor = StreamReactor<Response>::Create(context, registry_, &streams_, *state, deadline);
  const absl::Status started =
      starter_->Start(std::move(converted->spec), *std::move(state), reactor, converted->stream_interval, deadline,
                      converted->min_weight_version, now);
  if (!started.ok()) reactor->Refuse(started);
  return reactor.get();
}

grpc::ServerWriteReactor<v1::GenerateResponse>* RolloutService::StartAttach(grpc::CallbackServerContext* context,
                                                                            const v1::GenerateRequest& request) {
  using Failed = FailedStream<v1::GenerateResponse>;
  const auto attach = ConvertAttach(request);
  if (!attach.ok()) return new Failed(context, attach.status());
  const std::shared_ptr<RequestState> state = registry_->Find(attach->request_id);
  if (state == nullptr || state->info().score) {
    return new Failed(
        context,
        absl::NotFoundError(absl::StrCat(
            "request_id: \"", attach->request_id,
            "\" is not in flight and has no retained result: it never was, was cancelled, or its time is over")));
  }
  const auto point = ResolveAttach(*attach, state->info());
  if (!point.ok()) return new Failed(context, point.status());
  const absl::Time deadline = EffectiveDeadline(*context, absl::Now());
  auto reactor = StreamReactor<v1::GenerateResponse>::Create(context, registry_, &streams_, state, deadline);
  const absl::Status attached = state->Attach(reactor, attach->stream_interval, *point, deadline);
  if (!attached.ok()) reactor->Refuse(attached);
  registry_->WatchDue(*state);
  return reactor.get();
}

grpc::ServerWriteReactor<v1::GenerateResponse>* RolloutService::Generate(grpc::CallbackServerContext* context,
                                                                         const v1::GenerateRequest* request) {
  if (const absl::Status status = token_.Authorise(*context); !status.ok()) {
    return new FailedStream<v1::GenerateResponse>(context, status);
  }
  if (request->has_attach()) return StartAttach(context, *request);
  return StartStream<v1::GenerateResponse>(context, ConvertGenerate(*request, request_context_, DrawDefaults()));
}

grpc::ServerWriteReactor<v1::ScoreResponse>* RolloutService::Score(grpc::CallbackServerContext* context,
                                                                   const v1::ScoreRequest* request) {
  if (const absl::Status status = token_.Authorise(*context); !status.ok()) {
    return new FailedStream<v1::ScoreResponse>(context, status);
  }
  return StartStream<v1::ScoreResponse>(context, ConvertScore(*request, request_context_, DrawDefaults()));
}

absl::Status RolloutService::HandleAbort(const v1::AbortRequest& request, v1::AbortResponse* response) {
  LOCKSTEP_RETURN_IF_ERROR(ValidateAbort(request));
  const std::shared_ptr<RequestState> state = registry_->Find(request.request_id());
  if (state == nullptr) return absl::OkStatus();
  std::optional<int32_t> sample;
  if (request.has_sample_index()) {
    const RequestInfo& info = state->info();
    sample = request.sample_index() - info.first_sample_index;
    if (*sample < 0 || *sample >= info.n) {
      return absl::InvalidArgumentError(absl::StrCat("sample_index: value ", request.sample_index(),
                                                     "; want one of the request's, ", info.first_sample_index, " to ",
                                                     info.first_sample_index + info.n - 1));
    }
  }
  response->set_found(registry_->Abort(*state, sample, AbortReason::kClient));
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* RolloutService::Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                                v1::AbortResponse* response) {
  absl::Status status = token_.Authorise(*context);
  if (status.ok()) status = HandleAbort(*request, response);
  return FinishUnary(context, status);
}

grpc::ServerUnaryReactor* RolloutService::GetInfo(grpc::CallbackServerContext* context,
                                                  const v1::GetInfoRequest* request, v1::GetInfoResponse* response) {
  absl::Status status = token_.Authorise(*context);
  if (status.ok()) status = CheckNoUnknownFields(*request);
  if (status.ok()) {
    FillInfo(*model_, request_context_, backend_, response);
    FillWeightVersion(model_->worker->weight_version(), response->mutable_weight_version());
  }
  return FinishUnary(context, status);
}

grpc::ServerUnaryReactor* RolloutService::GetLoad(grpc::CallbackServerContext* context,
                                                  const v1::GetLoadRequest* request, v1::GetLoadResponse* response) {
  absl::Status status = token_.Authorise(*context);
  if (status.ok()) status = CheckNoUnknownFields(*request);
  if (!status.ok()) return FinishUnary(context, status);
  const WorkerLoad load = model_->worker->Load();
  response->set_running_sequences(load.running_sequences);
  response->set_waiting_sequences(load.waiting_sequences);
  response->set_running_requests(load.running_requests);
  response->set_version_waiting_requests(starter_->waiting());
  response->set_kv_pages_total(load.kv_pages_total);
  response->set_kv_pages_used(load.kv_pages_used);
  response->set_state_slots_total(load.state_slots_total);
  response->set_state_slots_used(load.state_slots_used);
  response->set_steps(load.steps);
  response->set_generated_tokens(load.generated_tokens);
  response->set_prefill_tokens(load.prefill_tokens);
  response->set_preemptions(load.preemptions);
  response->set_non_finite_samples(load.non_finite_samples);
  response->set_last_step_ms(load.last_step_ms);
  response->set_steps_ms(load.steps_ms);
  response->set_host_ms(load.host_ms);
  if (load.weights_since > absl::InfinitePast())
    response->set_weights_age_ms(absl::ToInt64Milliseconds(absl::Now() - load.weights_since));
  response->set_buffered_bytes(registry_->buffered_bytes());
  response->set_retained_bytes(registry_->retained_bytes());
  FillWeightVersion(model_->worker->weight_version(), response->mutable_weight_version());
  response->set_draining(starter_->draining());
  response->set_paused(load.paused);
  return FinishUnary(context, status);
}

}  // namespace lockstep

#include "rollout/server/weights_service.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "rollout/server/check_range.h"
#include "rollout/server/info.h"
#include "rollout/server/receive_call.h"
#include "rollout/server/respond.h"
#include "rollout/server/stream_reactor.h"
#include "rollout/server/unknown_fields.h"
#include "rollout/server/weight_fields.h"
#include "weights_sync/call_limit.h"
#include "weights_sync/manifest.h"

namespace lockstep {
namespace {

constexpr int64_t kDefaultLeaseMs = 60'000, kMinLeaseMs = 1'000, kMaxLeaseMs = 3'600'000;
// For the copy of the version that serves, where the client sets no earlier deadline.
constexpr absl::Duration kMaxBeginWait = absl::Seconds(120);
constexpr int64_t kMaxFinishMs = 3'600'000;
constexpr int64_t kMaxChunkBytes = 1 << 20;
constexpr int64_t kDefaultJoinMs = 60'000, kMinJoinMs = 1'000, kMaxJoinMs = 600'000;
constexpr int64_t kMaxGeneration = int64_t{1} << 53;
constexpr size_t kMaxGroupName = 64;

absl::Status CheckGroup(const std::string& group) {
  if (!group.empty() && group.size() <= kMaxGroupName) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("group: a name of ", group.size(), " bytes; want 1 to ", kMaxGroupName));
}

// While the client waits, until its deadline or `latest`.
CallLimit LimitOf(grpc::ServerContext& context, absl::Time latest = absl::InfiniteFuture()) {
  return {.deadline = std::min(absl::FromChrono(context.deadline()), latest),
          .cancelled = [&context] { return context.IsCancelled(); }};
}

class RefusedReceive final : public grpc::ServerBidiReactor<v1::ReceiveRequest, v1::ReceiveResponse> {
 public:
  explicit RefusedReceive(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

absl::StatusOr<DType> DTypeOf(v1::TensorDType dtype, const std::string& field) {
  switch (dtype) {
    case v1::TENSOR_DTYPE_FLOAT32:
      return DType::kF32;
    case v1::TENSOR_DTYPE_BFLOAT16:
      return DType::kBF16;
    case v1::TENSOR_DTYPE_FLOAT16:
      return DType::kF16;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": ", static_cast<int>(dtype), "; want FLOAT32, BFLOAT16 or FLOAT16"));
  }
}

v1::UpdateState ToProto(UpdateState state) {
  switch (state) {
    case UpdateState::kServing:
      return v1::UPDATE_STATE_SERVING;
    case UpdateState::kReceiving:
      return v1::UPDATE_STATE_RECEIVING;
    case UpdateState::kVerified:
      return v1::UPDATE_STATE_VERIFIED;
    case UpdateState::kCommitting:
      return v1::UPDATE_STATE_COMMITTING;
    case UpdateState::kRestoring:
      return v1::UPDATE_STATE_RESTORING;
  }
  return v1::UPDATE_STATE_UNSPECIFIED;
}

absl::StatusOr<Manifest> ManifestOf(const v1::Manifest& proto) {
  Manifest manifest;
  for (int i = 0; i < proto.tensors_size(); ++i) {
    const v1::TensorInfo& tensor = proto.tensors(i);
    LOCKSTEP_ASSIGN_OR_RETURN(const DType dtype,
                              DTypeOf(tensor.dtype(), absl::StrCat("manifest.tensors[", i, "].dtype")));
    manifest.tensors.push_back({tensor.name(), dtype, {tensor.shape().begin(), tensor.shape().end()}});
  }
  if (manifest.tensors.empty()) return absl::InvalidArgumentError("manifest.tensors: empty; want the tensors to come");
  if (proto.has_base_version()) {
    manifest.base_version = WeightVersion{proto.base_version().epoch(), proto.base_version().step()};
  }
  return manifest;
}

absl::StatusOr<InFlightPolicy> PolicyOf(v1::InFlightPolicy policy, const char* field) {
  switch (policy) {
    case v1::IN_FLIGHT_POLICY_UNSPECIFIED:
    case v1::IN_FLIGHT_POLICY_RECOMPUTE:
      return InFlightPolicy::kRecompute;
    case v1::IN_FLIGHT_POLICY_FINISH:
      return InFlightPolicy::kFinish;
    case v1::IN_FLIGHT_POLICY_KEEP:
      return InFlightPolicy::kKeep;
    case v1::IN_FLIGHT_POLICY_ABORT:
      return InFlightPolicy::kAbort;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": ", static_cast<int>(policy), "; want FINISH, KEEP, RECOMPUTE or ABORT"));
  }
}

absl::StatusOr<WeightSwitch> SwitchOf(const v1::CommitRequest& request) {
  WeightSwitch change;
  LOCKSTEP_ASSIGN_OR_RETURN(change.version, VersionOf(request.has_version(), request.version()));
  LOCKSTEP_ASSIGN_OR_RETURN(change.policy, PolicyOf(request.policy(), "policy"));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("finish_timeout_ms", request.finish_timeout_ms(), 0, kMaxFinishMs));
  change.finish_timeout = absl::Milliseconds(request.finish_timeout_ms());
  if (change.policy != InFlightPolicy::kFinish &&
      (request.finish_timeout_ms() != 0 || request.fallback() != v1::IN_FLIGHT_POLICY_UNSPECIFIED)) {
    return absl::InvalidArgumentError("finish_timeout_ms, fallback: set; want them with policy FINISH only");
  }
  if (request.fallback() != v1::IN_FLIGHT_POLICY_UNSPECIFIED) {
    LOCKSTEP_ASSIGN_OR_RETURN(change.fallback, PolicyOf(request.fallback(), "fallback"));
    if (change.fallback == InFlightPolicy::kFinish) {
      return absl::InvalidArgumentError("fallback: FINISH; want KEEP, RECOMPUTE or ABORT");
    }
  }
  return change;
}

}  // namespace

WeightsService::WeightsService(ServingModel* model, const std::string& nccl_library, PortToken token)
    : model_(*model),
      update_(model->tensors, model->worker->weight_version(), model->control),
      groups_(nccl_library, [this] { return model_.tensors->inbox()->UseOnThisThread(); }),
      token_(std::move(token)) {}

grpc::Status WeightsService::Begin(grpc::ServerContext* context, const v1::BeginRequest* request,
                                   v1::BeginResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.begin.before"));
    LOCKSTEP_ASSIGN_OR_RETURN(const WeightVersion version, VersionOf(request->has_version(), request->version()));
    LOCKSTEP_ASSIGN_OR_RETURN(Manifest manifest, ManifestOf(request->manifest()));
    const int64_t lease = request->lease_ms() == 0 ? kDefaultLeaseMs : request->lease_ms();
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("lease_ms", lease, kMinLeaseMs, kMaxLeaseMs));
    LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> received,
                              update_.Begin(version, std::move(manifest), absl::Milliseconds(lease),
                                            LimitOf(*context, absl::Now() + kMaxBeginWait)));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.begin.answer"));
    response->mutable_received_bytes()->Add(received.begin(), received.end());
    response->set_lease_ms(lease);
    response->set_max_chunk_bytes(kMaxChunkBytes);
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::Push(grpc::ServerContext* context, grpc::ServerReader<v1::PushRequest>* reader,
                                  v1::PushResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.push.before"));
    v1::PushRequest chunk;
    std::optional<WeightVersion> version;
    int64_t bytes = 0;
    while (reader->Read(&chunk)) {
      LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(chunk));
      LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.push.chunk"));
      if (!version) {
        LOCKSTEP_ASSIGN_OR_RETURN(version, VersionOf(chunk.has_version(), chunk.version()));
      } else if (chunk.has_version()) {
        return absl::InvalidArgumentError("version: set again; want it in the stream's first message only");
      }
      LOCKSTEP_RETURN_IF_ERROR(CheckRange("data", static_cast<int64_t>(chunk.data().size()), 0, kMaxChunkBytes));
      LOCKSTEP_RETURN_IF_ERROR(update_.Push(*version, chunk.tensor(), chunk.offset(),
                                            std::as_bytes(std::span(chunk.data().data(), chunk.data().size()))));
      bytes += static_cast<int64_t>(chunk.data().size());
    }
    if (!version) return absl::InvalidArgumentError("version: the stream ended before its first message");
    LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> received, update_.Received(*version));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.push.answer"));
    response->set_bytes(bytes);
    response->mutable_received_bytes()->Add(received.begin(), received.end());
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::Join(grpc::ServerContext* context, const v1::JoinRequest* request,
                                  v1::JoinResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.join.before"));
    LOCKSTEP_RETURN_IF_ERROR(CheckGroup(request->group()));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("generation", request->generation(), 0, kMaxGeneration));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("nranks", request->nranks(), 2, 65'536));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("rank", request->rank(), 0, request->nranks() - 1));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("root", request->root(), 0, request->nranks() - 1));
    if (request->root() == request->rank()) {
      return absl::InvalidArgumentError(
          absl::StrCat("root: ", request->root(), ", which is this worker's rank; want the sender's"));
    }
    const int64_t timeout = request->timeout_ms() == 0 ? kDefaultJoinMs : request->timeout_ms();
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("timeout_ms", timeout, kMinJoinMs, kMaxJoinMs));
    LOCKSTEP_RETURN_IF_ERROR(CheckRange("max_ctas", request->max_ctas(), 0, 64));
    TensorInbox* inbox = model_.tensors->inbox();
    if (inbox == nullptr) return absl::UnimplementedError("this worker takes weights over the stream only");
    const GroupJoin join = {.group = request->group(),
                            .generation = request->generation(),
                            .nranks = request->nranks(),
                            .rank = request->rank(),
                            .root = request->root(),
                            .unique_id = request->unique_id(),
                            .max_ctas = request->max_ctas()};
    LOCKSTEP_RETURN_IF_ERROR(groups_.Join(join, LimitOf(*context, absl::Now() + absl::Milliseconds(timeout))));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.join.answer"));
    response->set_bucket_bytes(inbox->buffer_bytes());
    response->set_nccl_version(groups_.nccl_version());
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

grpc::ServerBidiReactor<v1::ReceiveRequest, v1::ReceiveResponse>* WeightsService::Receive(
    grpc::CallbackServerContext* context) {
  if (const absl::Status status = token_.Authorise(*context); !status.ok()) return new RefusedReceive(ToGrpc(status));
  return new ReceiveCall(&update_, &groups_, absl::FromChrono(context->deadline()));
}

grpc::Status WeightsService::Leave(grpc::ServerContext* context, const v1::LeaveRequest* request,
                                   v1::LeaveResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_RETURN_IF_ERROR(CheckGroup(request->group()));
    response->set_left(groups_.Leave(request->group()));
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::Verify(grpc::ServerContext* context, const v1::VerifyRequest* request,
                                    v1::VerifyResponse*) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_ASSIGN_OR_RETURN(const WeightVersion version, VersionOf(request->has_version(), request->version()));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.verify.before"));
    LOCKSTEP_RETURN_IF_ERROR(
        update_.Verify(version, std::vector<uint64_t>(request->digests().begin(), request->digests().end())));
    return FailpointStatus("weights.verify.answer");
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::Commit(grpc::ServerContext* context, const v1::CommitRequest* request,
                                    v1::CommitResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_ASSIGN_OR_RETURN(WeightSwitch change, SwitchOf(*request));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.commit.before"));
    const auto install = [&](const std::function<bool()>& given_up) -> absl::Status {
      change.given_up = given_up;
      LOCKSTEP_ASSIGN_OR_RETURN(const WeightSwitchResult result, model_.control->SwitchWeights(change, [&] {
        return model_.install_weights(change.version);
      }));
      response->set_wait_ms(absl::ToDoubleMilliseconds(result.wait));
      response->set_pause_ms(absl::ToDoubleMilliseconds(result.pause));
      response->set_kept(result.kept);
      response->set_recomputed(result.recomputed);
      response->set_aborted(result.aborted);
      return absl::OkStatus();
    };
    LOCKSTEP_RETURN_IF_ERROR(update_.Commit(change.version, install, LimitOf(*context)));
    return FailpointStatus("weights.commit.answer");
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::Rollback(grpc::ServerContext* context, const v1::RollbackRequest* request,
                                      v1::RollbackResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    LOCKSTEP_ASSIGN_OR_RETURN(const WeightVersion version, VersionOf(request->has_version(), request->version()));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.rollback.before"));
    LOCKSTEP_ASSIGN_OR_RETURN(const bool dropped, update_.Rollback(version));
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.rollback.answer"));
    response->set_dropped(dropped);
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

grpc::Status WeightsService::GetStatus(grpc::ServerContext* context, const v1::GetStatusRequest* request,
                                       v1::GetStatusResponse* response) {
  if (const absl::Status status = token_.Authorise(*context); !status.ok()) return ToGrpc(status);
  if (const absl::Status status = CheckNoUnknownFields(*request); !status.ok()) return ToGrpc(status);
  const UpdateStatus status = update_.status();
  response->set_state(ToProto(status.state));
  FillWeightVersion(status.serving, response->mutable_weight_version());
  if (status.state != UpdateState::kServing) FillWeightVersion(status.open, response->mutable_open_version());
  response->set_lease_left_ms(absl::ToInt64Milliseconds(status.lease_left));
  response->set_received_bytes(status.received_bytes);
  response->set_total_bytes(status.total_bytes);
  response->set_shadow_bytes(status.shadow.done);
  response->set_shadow_total_bytes(status.shadow.total);
  return grpc::Status::OK;
}

grpc::Status WeightsService::GetDigests(grpc::ServerContext* context, const v1::GetDigestsRequest* request,
                                        v1::GetDigestsResponse* response) {
  const auto run = [&]() -> absl::Status {
    LOCKSTEP_RETURN_IF_ERROR(token_.Authorise(*context));
    LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(*request));
    const std::span<const TensorSlot> slots = model_.tensors->slots();
    std::vector<bool> wanted(slots.size(), request->names().empty());
    for (const std::string& name : request->names()) {
      const std::optional<size_t> slot = SlotNamed(slots, name);
      if (!slot) {
        return absl::InvalidArgumentError(absl::StrCat("names: \"", name, "\" is no tensor of the model"));
      }
      wanted[*slot] = true;
    }
    LOCKSTEP_ASSIGN_OR_RETURN(const VersionDigests serving, model_.tensors->ServingDigests());
    FillWeightVersion(serving.version, response->mutable_weight_version());
    response->set_weights_receive(ProtoReceive(model_.weights_receive));
    for (size_t s = 0; s < slots.size(); ++s) {
      if (!wanted[s]) continue;
      v1::TensorDigest* tensor = response->add_tensors();
      tensor->set_name(slots[s].name);
      tensor->set_dtype(ProtoDType(slots[s].held));
      tensor->mutable_shape()->Add(slots[s].shape.begin(), slots[s].shape.end());
      tensor->set_digest(serving.digests[s]);
    }
    return absl::OkStatus();
  };
  return ToGrpc(run());
}

}  // namespace lockstep

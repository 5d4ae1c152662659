#include "rollout/server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr char kServiceName[] = "lockstep.v1.Rollout";
constexpr absl::Duration kLeaseCheckPeriod = absl::Milliseconds(500);
constexpr int kMaxControlMessageBytes = 16 << 20;  // a manifest, or a chunk of a tensor

// "HOST:PORT" with the port that was bound. Addresses without a port (unix:...) stay as they are.
std::string WithPort(const std::string& address, int port) {
  const size_t colon = address.rfind(':');
  if (address.rfind("unix:", 0) == 0 || colon == std::string::npos) return address;
  return absl::StrCat(address.substr(0, colon), ":", port);
}

PortToken DataToken(const ServerOptions& options) {
  return {options.token, "token_file"};
}

PortToken ControlToken(const ServerOptions& options) {
  return {options.control_token, "control_token_file"};
}

void Configure(grpc::ServerBuilder& builder, const std::string& address, const PortToken& token, const TlsFiles& tls,
               int* port) {
  builder.AddListeningPort(address, ServerCredentialsOf(tls), port);
  if (token.wanted()) {
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
    interceptors.push_back(GuardOtherServices(token));
    builder.experimental().SetInterceptorCreators(std::move(interceptors));
  }
  // Two workers on one port would each get some of the calls.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A dead peer is noticed within a minute, however long its stream is silent; clients may ping as often as every 10 s.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  // For reflection, the only synchronous service.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 2);
}

absl::Status ListenError(const std::string& flag, const std::string& address, const TlsFiles& tls) {
  // gRPC does not tell which of the two it was.
  const char* pair = tls.certificate.empty() ? "" : ", and --tls_cert and --tls_key that belong together";
  return absl::UnavailableError(absl::StrCat("--", flag, ": cannot listen on \"", address,
                                             "\"; want HOST:PORT with a free port, or port 0 to pick one", pair));
}

}  // namespace

absl::StatusOr<std::unique_ptr<RolloutServer>> RolloutServer::Start(ServingModel model, const ServerOptions& options) {
  std::unique_ptr<RolloutServer> server(new RolloutServer(std::move(model), options));
  LOCKSTEP_RETURN_IF_ERROR(server->Listen(options));
  return server;
}

RolloutServer::RolloutServer(ServingModel model, const ServerOptions& options)
    : model_(std::move(model)), tasks_(std::make_unique<TaskThread>()) {
  const ServiceLimits& limits = options.limits;
  registry_ = std::make_unique<RequestRegistry>(model_.worker.get(),
                                                RegistryOptions{.max_buffered_bytes = limits.max_buffered_bytes,
                                                                .max_retained_bytes = limits.max_retained_bytes,
                                                                .reattach = limits.reattach},
                                                tasks_.get());
  starter_ = std::make_unique<RequestStarter>(model_.worker.get(), registry_.get(), tasks_.get(),
                                              limits.max_version_wait, limits.max_waiting_sequences);
  service_ = std::make_unique<RolloutService>(&model_, limits, options.backend, registry_.get(), starter_.get(),
                                              DataToken(options));
  if (model_.control != nullptr) {
    control_ = std::make_unique<ControlService>(
        model_.control, [this](absl::Time deadline) { StopServing(deadline); }, ControlToken(options));
    if (model_.tensors != nullptr) {
      weights_ = std::make_unique<WeightsService>(&model_, options.nccl_library, ControlToken(options));
      ExpireLeases();
    } else {
      weights_off_ = std::make_unique<WeightsOffService>(ControlToken(options));
    }
  }
}

absl::Status RolloutServer::Listen(const ServerOptions& options) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  int data_port = 0;
  grpc::ServerBuilder data;
  Configure(data, options.listen, DataToken(options), options.tls, &data_port);
  data.SetMaxReceiveMessageSize(static_cast<int>(options.limits.max_request_bytes));
  data.RegisterService(service_.get());
  data_server_ = data.BuildAndStart();
  if (data_server_ == nullptr || data_port == 0) return ListenError("listen", options.listen, options.tls);

  int control_port = 0;
  grpc::ServerBuilder control;
  Configure(control, options.control_listen, ControlToken(options), options.tls, &control_port);
  control.SetMaxReceiveMessageSize(kMaxControlMessageBytes);
  if (control_ != nullptr) control.RegisterService(control_.get());
  if (weights_ != nullptr) control.RegisterService(weights_.get());
  if (weights_off_ != nullptr) control.RegisterService(weights_off_.get());
  control_server_ = control.BuildAndStart();
  if (control_server_ == nullptr || control_port == 0)
    return ListenError("control_listen", options.control_listen, options.tls);

  data_server_->GetHealthCheckService()->SetServingStatus(kServiceName, true);
  data_address_ = WithPort(options.listen, data_port);
  control_address_ = WithPort(options.control_listen, control_port);
  return absl::OkStatus();
}

void RolloutServer::ExpireLeases() {
  weights_->ExpireLease();
  tasks_->AddAt(absl::Now() + kLeaseCheckPeriod, [this] { ExpireLeases(); });
}

void RolloutServer::StopServing(absl::Time deadline) {
  // SetServingStatus(false) sets every service's, "" included.
  data_server_->GetHealthCheckService()->SetServingStatus(false);
  control_server_->GetHealthCheckService()->SetServingStatus(false);
  starter_->Drain();
  model_.worker->Drain(deadline);
}

void RolloutServer::Drain(absl::Time deadline, absl::Duration delivery) {
  StopServing(deadline);
  // Readers that are behind have what is left of the time, and `delivery` at least. What is open then but no stream is
  // a health watch, which would last for good.
  service_->streams().AwaitNone(std::max(deadline, absl::Now() + delivery));
  data_server_->Shutdown(std::chrono::system_clock::now());
  control_server_->Shutdown(std::chrono::system_clock::now());
}

RolloutServer::~RolloutServer() {
  if (data_server_ != nullptr) data_server_->Shutdown(std::chrono::system_clock::now());
  if (control_server_ != nullptr) control_server_->Shutdown(std::chrono::system_clock::now());
  data_server_.reset();
  control_server_.reset();
  tasks_->Stop();
  // An update may be at work on the worker's weights.
  weights_.reset();
  // The worker holds requests, which count their bytes in the registry.
  model_.worker.reset();
}

}  // namespace lockstep

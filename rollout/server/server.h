// The two listening ports of a worker and everything behind them, from start to drained.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rollout/server/control_service.h"
#include "rollout/server/credentials.h"
#include "rollout/server/limits.h"
#include "rollout/server/request_registry.h"
#include "rollout/server/request_starter.h"
#include "rollout/server/rollout_service.h"
#include "rollout/server/task_thread.h"
#include "rollout/server/weights_off_service.h"
#include "rollout/server/weights_service.h"
#include "rollout/worker/make_worker.h"

namespace lockstep {

struct ServerOptions {
  std::string listen;          // HOST:PORT of the data plane; port 0 picks one
  std::string control_listen;  // of the control plane
  std::string token;           // that calls of the data plane must carry; empty: none
  std::string control_token;   // of the control plane
  TlsFiles tls;                // of both
  std::string backend;         // for GetInfo
  std::string nccl_library;    // see WeightsService
  ServiceLimits limits;
};

// Start, Drain and the destructor are called by one thread.
class RolloutServer {
 public:
  // UNAVAILABLE names the flag and the address if a port cannot be had.
  static absl::StatusOr<std::unique_ptr<RolloutServer>> Start(ServingModel model, const ServerOptions& options);
  // Cancels what is left.
  ~RolloutServer();

  // With the ports that were picked.
  const std::string& data_address() const { return data_address_; }
  const std::string& control_address() const { return control_address_; }
  absl::Status WorkerHealth() const { return model_.worker->Health(); }

  // Refuses new requests, lets those in flight finish until `deadline`, ends the rest with what they have, gives
  // streams until `deadline`, and `delivery` at least, to be read, and closes the ports. Waits for no other call.
  void Drain(absl::Time deadline, absl::Duration delivery);

 private:
  RolloutServer(ServingModel model, const ServerOptions& options);
  absl::Status Listen(const ServerOptions& options);
  // Refuses new requests and lets those in flight finish until `deadline`.
  void StopServing(absl::Time deadline);
  void ExpireLeases();

  // In the order of construction; ~RolloutServer says in which order they end.
  ServingModel model_;
  std::unique_ptr<TaskThread> tasks_;
  std::unique_ptr<RequestRegistry> registry_;
  std::unique_ptr<RequestStarter> starter_;
  std::unique_ptr<RolloutService> service_;
  // One of them, the second for --weights_receive=off; none for a worker that cannot be held.
  std::unique_ptr<WeightsService> weights_;
  std::unique_ptr<WeightsOffService> weights_off_;
  std::unique_ptr<ControlService> control_;  // null: a worker that cannot be held
  std::unique_ptr<grpc::Server> data_server_;
  std::unique_ptr<grpc::Server> control_server_;
  std::string data_address_;
  std::string control_address_;
};

}  // namespace lockstep

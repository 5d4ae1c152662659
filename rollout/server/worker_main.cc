#include "rollout/server/worker_main.h"

#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "rollout/base/check.h"
#include "rollout/base/failpoint.h"
#include "rollout/server/flags.h"
#include "rollout/server/server.h"
#include "spdlog/sinks/stdout_color_sinks.h"
#include "spdlog/spdlog.h"

namespace lockstep {
namespace {

// After a drain every stream's client gets at least this long to read what it was waiting for.
constexpr absl::Duration kDelivery = absl::Seconds(2);
constexpr absl::Duration kHealthInterval = absl::Milliseconds(200);

// Takes SIGTERM and SIGINT on a thread of its own: they are blocked in every other (threads inherit the mask). Before
// the worker serves there is nothing to drain and a signal ends the process; then the first one asks for the drain and
// the second ends the process.
class TerminationSignals {
 public:
  TerminationSignals() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    LOCKSTEP_CHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0, "cannot block signals");
    // Detached, with its own share of the state: it waits until the process ends.
    std::thread([signals, state = state_] {
      while (true) {
        int signal = 0;
        LOCKSTEP_CHECK(sigwait(&signals, &signal) == 0, "cannot wait for signals");
        if (!state->serving || state->requested.HasBeenNotified()) std::_Exit(128 + signal);
        state->requested.Notify();
      }
    }).detach();
  }

  void SetServing() { state_->serving = true; }
  // False: not within `timeout`.
  bool WaitUntilRequested(absl::Duration timeout) { return state_->requested.WaitForNotificationWithTimeout(timeout); }

 private:
  struct State {
    std::atomic<bool> serving{false};
    absl::Notification requested;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

int Fail(const absl::Status& status) {
  spdlog::error("{}", std::string(status.message()));
  return 1;
}

// Ends the process, draining or not, when a step does not end: then nothing ends any more, so nothing can be drained,
// nor the worker's thread be joined.
class StepWatch {
 public:
  explicit StepWatch(const RolloutServer& server) : thread_([this, &server] { Run(server); }) {}
  ~StepWatch() {
    ended_.Notify();
    thread_.join();
  }

 private:
  void Run(const RolloutServer& server) {
    while (!ended_.WaitForNotificationWithTimeout(kHealthInterval)) {
      const absl::Status health = server.WorkerHealth();
      if (!absl::IsDeadlineExceeded(health)) continue;
      Fail(health);
      spdlog::default_logger()->flush();
      std::_Exit(1);
    }
  }

  absl::Notification ended_;
  std::thread thread_;
};

// Until a signal has been answered with a drain. What the worker's device failed with, if it did, before or meanwhile.
absl::Status Serve(RolloutServer& server, TerminationSignals& signals, absl::Duration drain) {
  const StepWatch watch(server);
  while (!signals.WaitUntilRequested(kHealthInterval)) {
    const absl::Status health = server.WorkerHealth();
    if (health.ok() || absl::IsDeadlineExceeded(health)) continue;
    // Every request has its error by now; what is left is to say so to readers and to the supervisor.
    server.Drain(absl::Now(), kDelivery);
    return health;
  }
  spdlog::info("draining for at most {} s; a second signal ends the process at once", absl::ToDoubleSeconds(drain));
  server.Drain(absl::Now() + drain, kDelivery);
  return server.WorkerHealth();
}

bool IsLoopback(const std::string& address) {
  return absl::StartsWith(address, "127.") || absl::StartsWith(address, "localhost:") ||
         absl::StartsWith(address, "[::1]:") || absl::StartsWith(address, "unix:");
}

void WarnIfOpen(const std::string& address, bool authenticated, bool encrypted) {
  if (IsLoopback(address)) return;
  if (!authenticated) {
    spdlog::warn("listening on {} without authentication{}: whoever can reach it can use it", address,
                 encrypted ? "" : " or encryption");
  } else if (!encrypted) {
    spdlog::warn("listening on {} without encryption: the token can be read on its way", address);
  }
}

}  // namespace

int WorkerMain(int argc, char** argv,
               absl::FunctionRef<absl::StatusOr<ServingModel>(const WorkerOptions&)> make_worker) {
  // Standard output is for the ready line.
  spdlog::set_default_logger(spdlog::stderr_color_mt("lockstep-worker"));
  const auto flags = ParseWorkerFlags(argc, argv);
  if (!flags.ok()) return Fail(flags.status());

  if (const absl::Status armed = ArmFailpointsFromEnvironment(); !armed.ok()) return Fail(armed);

  TerminationSignals signals;
  auto model = make_worker(flags->worker);
  if (!model.ok()) return Fail(model.status());
  auto server = RolloutServer::Start(*std::move(model), flags->server);
  if (!server.ok()) return Fail(server.status());
  const bool encrypted = !flags->server.tls.certificate.empty();
  WarnIfOpen((*server)->data_address(), !flags->server.token.empty(), encrypted);
  WarnIfOpen((*server)->control_address(), !flags->server.control_token.empty(), encrypted);
  signals.SetServing();
  std::printf("lockstep-worker ready data=%s control=%s\n", (*server)->data_address().c_str(),
              (*server)->control_address().c_str());
  std::fflush(stdout);

  if (const absl::Status served = Serve(**server, signals, flags->drain); !served.ok()) return Fail(served);
  server->reset();
  spdlog::info("drained");
  return 0;
}

}  // namespace lockstep

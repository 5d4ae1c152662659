// What a port asks of its callers, and what it shows them: bearer tokens and TLS, from files.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace lockstep {

// A port's token. Immutable: any thread may use it.
class PortToken {
 public:
  // `token`: empty for a port that asks for none. `flag`: the flag it came from, for messages.
  PortToken(std::string token, std::string flag) : token_(std::move(token)), flag_(std::move(flag)) {}

  bool wanted() const { return !token_.empty(); }
  // UNAUTHENTICATED unless the call carries `authorization: Bearer TOKEN`. Every handler of a service of this project
  // begins with it: in this gRPC an interceptor cannot keep a handler from running.
  absl::Status Authorise(const grpc::ServerContextBase& context) const;

 private:
  std::string token_;
  std::string flag_;
};

// For the services that gRPC brings along: calls to them without the token end as UNAUTHENTICATED; what their handlers
// answer is not sent. Health stays open, for load balancers. The project's own services are left to their handlers.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> GuardOtherServices(const PortToken& token);

// The first line of `path`: 16 to 4096 printable ASCII characters without spaces. Empty for an empty path.
// INVALID_ARGUMENT (also for a file that group or others may access) names the flag; no message shows the token.
absl::StatusOr<std::string> ReadTokenFile(absl::string_view flag, const std::string& path);

// A certificate chain with its key, in PEM; both empty: no TLS.
struct TlsFiles {
  std::string certificate;
  std::string key;
};

// Both or none of the paths are empty. INVALID_ARGUMENT names the flag.
absl::StatusOr<TlsFiles> ReadTlsFiles(const std::string& certificate_path, const std::string& key_path);

std::shared_ptr<grpc::ServerCredentials> ServerCredentialsOf(const TlsFiles& tls);

}  // namespace lockstep

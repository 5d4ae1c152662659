#include "rollout/server/credentials.h"

#include <fcntl.h>
#include <grpc/grpc.h>
#include <grpcpp/support/server_interceptor.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr size_t kMinToken = 16, kMaxToken = 4096;
constexpr size_t kMaxPem = 1 << 20;
constexpr absl::string_view kScheme = "Bearer ";

// Its time depends on the length of `given` alone.
bool SameBytes(absl::string_view expected, absl::string_view given) {
  volatile unsigned difference = expected.size() == given.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    difference = difference | static_cast<unsigned char>(given[i] ^ expected[i % expected.size()]);
  }
  return difference == 0;
}

struct FileContent {
  std::string bytes;  // up to the limit asked for
  mode_t mode = 0;
};

absl::StatusOr<FileContent> ReadFile(absl::string_view flag, const std::string& path, size_t limit) {
  const auto failed = [&](const char* what) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": cannot ", what, " \"", path,
                                                   "\": ", std::strerror(errno), "; want a file that can be read"));
  };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return failed("open");
  const absl::Cleanup closing = [file] { close(file); };
  struct stat about = {};
  if (fstat(file, &about) != 0) return failed("look at");
  FileContent content{.bytes = std::string(limit, '\0'), .mode = about.st_mode};
  size_t filled = 0;
  while (filled < limit) {
    const ssize_t got = read(file, content.bytes.data() + filled, limit - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return failed("read");
    if (got == 0) break;
    filled += static_cast<size_t>(got);
  }
  content.bytes.resize(filled);
  return content;
}

absl::StatusOr<std::string> ReadPem(absl::string_view flag, const std::string& path, absl::string_view want) {
  LOCKSTEP_ASSIGN_OR_RETURN(FileContent content, ReadFile(flag, path, kMaxPem + 1));
  if (content.bytes.size() > kMaxPem) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, ": \"", path, "\" has more than ", kMaxPem, " bytes; want ", want, " in PEM"));
  }
  if (!absl::StrContains(content.bytes, "-----BEGIN ")) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": no \"-----BEGIN \" in the ", content.bytes.size(),
                                                   " bytes of \"", path, "\"; want ", want, " in PEM"));
  }
  return std::move(content.bytes);
}

class Guard final : public grpc::experimental::Interceptor {
 public:
  Guard(const PortToken* token, grpc::ServerContextBase* context) : token_(*token), context_(*context) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      if (const absl::Status status = token_.Authorise(context_); !status.ok()) {
        // As TryCancel, which has no choice of the status. The handler runs, and whatever it sends is dropped.
        grpc_call_cancel_with_status(context_.c_call(), static_cast<grpc_status_code>(status.code()),
                                     std::string(status.message()).c_str(), nullptr);
      }
    }
    methods->Proceed();
  }

 private:
  const PortToken& token_;
  grpc::ServerContextBase& context_;
};

class GuardFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit GuardFactory(const PortToken& token) : token_(token) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override {
    const absl::string_view method = info->method();
    const bool health = method == "/grpc.health.v1.Health/Check" || method == "/grpc.health.v1.Health/Watch";
    if (health || absl::StartsWith(method, "/lockstep.v1.")) return nullptr;
    return new Guard(&token_, info->server_context());
  }

 private:
  const PortToken token_;
};

}  // namespace

absl::Status PortToken::Authorise(const grpc::ServerContextBase& context) const {
  if (!wanted()) return absl::OkStatus();
  const auto& metadata = context.client_metadata();
  const auto given = metadata.equal_range("authorization");
  const char* seen = "missing";
  if (given.first != given.second) {
    const absl::string_view value(given.first->second.data(), given.first->second.size());
    if (std::next(given.first) != given.second) {
      seen = "given more than once";
    } else if (SameBytes(absl::StrCat(kScheme, token_), value)) {
      return absl::OkStatus();
    } else {
      seen = "not this port's token";
    }
  }
  return absl::UnauthenticatedError(absl::StrCat("authorization: ", seen,
                                                 "; want metadata \"authorization: Bearer TOKEN\" with the token of "
                                                 "the worker's --",
                                                 flag_));
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> GuardOtherServices(const PortToken& token) {
  return std::make_unique<GuardFactory>(token);
}

absl::StatusOr<std::string> ReadTokenFile(absl::string_view flag, const std::string& path) {
  if (path.empty()) return std::string();
  LOCKSTEP_ASSIGN_OR_RETURN(FileContent content, ReadFile(flag, path, kMaxToken + 1));
  if ((content.mode & 077) != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--%s: \"%s\" has mode %03o; want a file that its owner alone may access (chmod 600)", flag,
                        path, content.mode & 0777));
  }
  std::string token = content.bytes.substr(0, content.bytes.find('\n'));
  const std::string want = absl::StrCat("; want ", kMinToken, " to ", kMaxToken,
                                        " printable ASCII characters without spaces, as the first line");
  if (token.size() < kMinToken || token.size() > kMaxToken) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": the first line of \"", path, "\" has ",
                                                   token.size() > kMaxToken ? "more than " : "",
                                                   std::min(token.size(), kMaxToken), " characters", want));
  }
  for (size_t i = 0; i < token.size(); ++i) {
    if (token[i] > ' ' && token[i] <= '~') continue;
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": character ", i + 1, " of \"", path, "\" is byte ",
                                                   static_cast<unsigned char>(token[i]), want));
  }
  return token;
}

absl::StatusOr<TlsFiles> ReadTlsFiles(const std::string& certificate_path, const std::string& key_path) {
  TlsFiles tls;
  if (certificate_path.empty() && key_path.empty()) return tls;
  if (certificate_path.empty() || key_path.empty()) {
    const bool key = key_path.empty();
    return absl::InvalidArgumentError(absl::StrCat("--", key ? "tls_key" : "tls_cert", ": not given, but --",
                                                   key ? "tls_cert" : "tls_key", " is; want both or none"));
  }
  LOCKSTEP_ASSIGN_OR_RETURN(tls.certificate, ReadPem("tls_cert", certificate_path, "a certificate chain"));
  LOCKSTEP_ASSIGN_OR_RETURN(tls.key, ReadPem("tls_key", key_path, "its private key"));
  return tls;
}

std::shared_ptr<grpc::ServerCredentials> ServerCredentialsOf(const TlsFiles& tls) {
  if (tls.certificate.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  options.pem_key_cert_pairs.push_back({.private_key = tls.key, .cert_chain = tls.certificate});
  return grpc::SslServerCredentials(options);
}

}  // namespace lockstep

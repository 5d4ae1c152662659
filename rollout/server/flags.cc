#include "rollout/server/flags.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"
#include "rollout/server/credentials.h"
#include "rollout/server/info.h"

ABSL_FLAG(
    std::string, model, "",
    "Directory of the checkpoint, as Hugging Face lays it out: config.json, *.safetensors, tokenizer.json. Required.");
ABSL_FLAG(std::string, backend, "cpu", "What computes: cpu, or cuda (in builds that have it).");
ABSL_FLAG(std::string, numerics, "auto",
          "Numerics profile: whose casts and order of arithmetic to reproduce. hf-torch: transformers' PyTorch code; "
          "hf: transformers with fla's kernels (hf-masked: forwards as long as the sliding window; hf-flash: PyTorch's "
          "flash attention; hf-autocast: fp32 weights under autocast); olmo-core: OLMo-core, unverified; "
          "fp32: no rounding below fp32. auto: for a bfloat16 checkpoint hf-torch on cpu and hf on cuda, else fp32.");
ABSL_FLAG(std::string, listen, "127.0.0.1:50051",
          "HOST:PORT of the data plane (lockstep.v1.Rollout). Port 0 picks a free one. Without --token_file whoever "
          "reaches it can use it.");
ABSL_FLAG(std::string, control_listen, "127.0.0.1:50052",
          "HOST:PORT of the control plane (lockstep.v1.Weights and Control). Port 0 picks a free one. Without "
          "--control_token_file whoever reaches it can replace the weights.");
ABSL_FLAG(std::string, token_file, "",
          "File whose first line is the data plane's token, 16 to 4096 printable characters without spaces; mode 600. "
          "With it every call there, but for health, must carry metadata \"authorization: Bearer TOKEN\".");
ABSL_FLAG(std::string, control_token_file, "", "The same for the control plane, with a token of its own.");
ABSL_FLAG(std::string, tls_cert, "", "Certificate chain (PEM) that both ports show; with --tls_key. Empty: no TLS.");
ABSL_FLAG(std::string, tls_key, "", "Private key (PEM) of --tls_cert.");

ABSL_FLAG(std::string, weights_receive, "staged",
          "How new weights arrive. staged: beside those that serve, in memory of the same size; generation goes on. "
          "direct: in their place, which takes no device memory but stops generation from the first byte to Commit; a "
          "copy in host memory undoes an update that fails. off: not at all, and without that memory.");
ABSL_FLAG(std::string, nccl_library, "",
          "NCCL's library, for weights by broadcast; loaded when a learner first asks for it. Empty: libnccl.so.2 from "
          "the loader's path.");
ABSL_FLAG(int32_t, threads, 0, "Threads that compute. 0: all cores this process may use.");
ABSL_FLAG(double, memory_gb, 0,
          "Memory for KV pages and recurrent states, in GB (1e9 bytes). 0: by --memory_fraction.");
ABSL_FLAG(
    double, memory_fraction, 0,
    "Share of the memory that is free once the weights are loaded (cuda: of the GPU's) to use for activations, KV "
    "pages and recurrent states. 0: 0.5 on cpu, 0.9 on cuda.");
ABSL_FLAG(int32_t, cuda_device, 0, "Which GPU, as CUDA numbers them.");
ABSL_FLAG(
    bool, cuda_graphs, true,
    "Record decode steps once for each batch size (of few sequences, for each power of two of their length) and replay "
    "them.");
ABSL_FLAG(
    bool, shared_prefix_attention, true,
    "On cuda, decode attention reads the keys and values that up to 8 sequences share (samples of one prompt) once "
    "for all of them. The same bits; off only to measure what it gives.");
ABSL_FLAG(int64_t, page_size, 64, "Tokens per KV page. A multiple of 16 (cuda: of 64).");
ABSL_FLAG(int64_t, max_batch_tokens, 0,
          "Tokens one step computes at most, decoding and prefill together. Larger: better throughput; smaller: "
          "steadier latency. At least --max_sequences. 0: 512 on cpu, 4096 on cuda, or --max_sequences if that is "
          "more.");
ABSL_FLAG(int64_t, mixed_batch_tokens, 0,
          "Tokens of a step while at least as many sequences decode as have a prompt to compute: prompts then ride in "
          "decode steps a piece at a time. Larger: sooner first tokens, less steady decoding. 0: max_batch_tokens on "
          "cpu, 512 on cuda.");
ABSL_FLAG(int64_t, max_sequences, 0,
          "Sequences that run at once. 0: 64 on cpu, 256 on cuda, or --max_batch_tokens if that is less.");

ABSL_FLAG(int64_t, max_waiting_sequences, 4096,
          "Sequences accepted but not running; past it requests are RESOURCE_EXHAUSTED.");
ABSL_FLAG(int64_t, max_prompt_tokens, 0,
          "Longest prompt of Generate, in tokens. 0: what the model and the memory allow.");
ABSL_FLAG(int32_t, max_n, 128, "Samples per request; no more than --max_waiting_sequences.");
ABSL_FLAG(int64_t, max_request_bytes, 16 << 20, "Largest request message, in bytes.");
ABSL_FLAG(double, max_buffered_mb, 1024,
          "Undelivered results of all requests together, in MiB; past it the reader with the most is cut.");
ABSL_FLAG(double, max_retained_mb, 256,
          "Results kept for re-attaching, all together, in MiB; past it the oldest are dropped.");
ABSL_FLAG(double, reattach_seconds, 120, "How long a result is kept for re-attaching after its stream ended.");
ABSL_FLAG(double, max_version_wait_seconds, 600, "How long a request may wait for min_weight_version.");
ABSL_FLAG(
    double, step_timeout_seconds, 0,
    "A step that takes longer will never end: the process exits with 1 for its supervisor. 0: 120 on cuda, none on "
    "cpu, where a large step may take minutes.");
ABSL_FLAG(double, drain_seconds, 30,
          "After SIGTERM or SIGINT: how long requests in flight may go on. Then they end with what they have. A second "
          "signal ends the process at once.");

namespace lockstep {
namespace {

struct FlagGroup {
  std::string_view title;
  std::vector<std::string_view> names;
};

// The order of --help.
const std::vector<FlagGroup>& Groups() {
  static const auto* groups = new std::vector<FlagGroup>{
      {"What to serve", {"model", "backend", "numerics"}},
      {"Where", {"listen", "control_listen"}},
      {"Who", {"token_file", "control_token_file", "tls_cert", "tls_key"}},
      {"Engine",
       {"threads", "cuda_device", "cuda_graphs", "shared_prefix_attention", "weights_receive", "nccl_library",
        "memory_fraction", "memory_gb", "page_size", "max_batch_tokens", "mixed_batch_tokens", "max_sequences"}},
      {"Limits",
       {"max_waiting_sequences", "max_prompt_tokens", "max_n", "max_request_bytes", "max_buffered_mb",
        "max_retained_mb", "reattach_seconds", "max_version_wait_seconds", "step_timeout_seconds"}},
      {"Shutdown", {"drain_seconds"}},
  };
  return *groups;
}

void PrintWrapped(std::string_view text, size_t indent, size_t width) {
  size_t column = 0;
  for (const auto word : absl::StrSplit(absl::string_view(text.data(), text.size()), ' ')) {
    if (column > 0 && column + 1 + word.size() > width) {
      std::printf("\n");
      column = 0;
    }
    std::printf("%*s%.*s", column == 0 ? static_cast<int>(indent) : 1, "", static_cast<int>(word.size()), word.data());
    column += word.size() + 1;
  }
  std::printf("\n");
}

void PrintFlag(const absl::CommandLineFlag& flag) {
  const std::string name(flag.Name());
  const std::string value = flag.DefaultValue();
  std::printf("  --%s%s\n", name.c_str(), value.empty() ? "" : absl::StrCat(" (default: ", value, ")").c_str());
  PrintWrapped(flag.Help(), 6, 94);
}

// absl's own --help shows flags by source file, and exits with 1.
void PrintHelp() {
  std::printf(
      "lockstep-worker: serves a checkpoint over gRPC.\n"
      "Completions come with the log-probabilities that their trainer computes.\n\n"
      "  lockstep-worker --model DIR [flags]\n\n"
      "Example:\n"
      "  lockstep-worker --model tests/data/tiny --listen 127.0.0.1:0 --control_listen 127.0.0.1:0\n\n"
      "Once it serves, the first line on standard output is\n"
      "  lockstep-worker ready data=HOST:PORT control=HOST:PORT\n"
      "The log goes to standard error. Exit status: 0 after a drained shutdown; 1 for errors.\n");
  const auto all = absl::GetAllFlags();
  std::vector<std::string_view> shown;
  for (const FlagGroup& group : Groups()) {
    std::printf("\n%.*s:\n", static_cast<int>(group.title.size()), group.title.data());
    for (const std::string_view name : group.names) {
      const auto found = all.find(absl::string_view(name.data(), name.size()));
      LOCKSTEP_CHECK(found != all.end(), "--help lists a flag that does not exist: {}", name);
      PrintFlag(*found->second);
    }
  }
  std::printf(
      "\nOther:\n  --help\n      This text.\n  --version\n      Version, commit and compiler.\n  --flagfile (default: "
      ")\n"
      "      Files with more flags, one a line; separated by commas.\n");
}

bool HasFlag(int argc, char** argv, std::string_view name) {
  for (int i = 1; i < argc; ++i) {
    std::string_view argument = argv[i];
    if (argument == "--") return false;
    while (!argument.empty() && argument.front() == '-') argument.remove_prefix(1);
    if (argv[i][0] == '-' && argument == name) return true;
  }
  return false;
}

template <class T>
absl::Status CheckFlag(std::string_view name, T value, T low, T high) {
  // Written so that a NaN fails.
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--", std::string(name), ": value ", value, "; want ", low, " to ", high));
}

absl::Status CheckAddress(std::string_view name, const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = -1;
  if (address.rfind("unix:", 0) == 0 && address.size() > 5) return absl::OkStatus();
  if (colon != std::string::npos && colon > 0 && absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 &&
      port <= 65535) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--", std::string(name), ": value \"", address, "\"; want HOST:PORT, port 0 to 65535"));
}

constexpr double kMaxMb = 1 << 24;
constexpr double kMaxSeconds = 7 * 24 * 3600;

// MakeWorker checks the values: other programs fill in WorkerOptions too.
absl::StatusOr<WorkerOptions> ReadWorkerOptions() {
  WorkerOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  if (options.model_dir.empty())
    return absl::InvalidArgumentError("--model: not given; want the directory of a checkpoint (see --help)");
  options.backend = absl::GetFlag(FLAGS_backend);
  options.numerics = absl::GetFlag(FLAGS_numerics);
  if (options.numerics == "auto") options.numerics.clear();
  options.threads = absl::GetFlag(FLAGS_threads);
  options.memory_gb = absl::GetFlag(FLAGS_memory_gb);
  const std::string receive = absl::GetFlag(FLAGS_weights_receive);
  if (receive != "staged" && receive != "direct" && receive != "off") {
    return absl::InvalidArgumentError(
        absl::StrCat("--weights_receive: value \"", receive, "\"; want staged, direct or off"));
  }
  options.weights_receive = receive == "staged"   ? WeightsReceive::kStaged
                            : receive == "direct" ? WeightsReceive::kDirect
                                                  : WeightsReceive::kOff;
  options.page_size = absl::GetFlag(FLAGS_page_size);
  options.max_batch_tokens = absl::GetFlag(FLAGS_max_batch_tokens);
  options.mixed_batch_tokens = absl::GetFlag(FLAGS_mixed_batch_tokens);
  options.max_sequences = absl::GetFlag(FLAGS_max_sequences);
  options.memory_fraction = absl::GetFlag(FLAGS_memory_fraction);
  options.cuda_device = absl::GetFlag(FLAGS_cuda_device);
  options.cuda_graphs = absl::GetFlag(FLAGS_cuda_graphs);
  options.shared_prefix_attention = absl::GetFlag(FLAGS_shared_prefix_attention);
  options.max_waiting_sequences = absl::GetFlag(FLAGS_max_waiting_sequences);
  const double step_timeout = absl::GetFlag(FLAGS_step_timeout_seconds);
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("step_timeout_seconds", step_timeout, 0.0, kMaxSeconds));
  options.step_timeout = absl::Seconds(step_timeout);
  return options;
}

absl::StatusOr<ServerOptions> ReadServerOptions() {
  ServerOptions options;
  options.listen = absl::GetFlag(FLAGS_listen);
  options.control_listen = absl::GetFlag(FLAGS_control_listen);
  options.backend = absl::GetFlag(FLAGS_backend);
  options.nccl_library = absl::GetFlag(FLAGS_nccl_library);
  LOCKSTEP_RETURN_IF_ERROR(CheckAddress("listen", options.listen));
  LOCKSTEP_RETURN_IF_ERROR(CheckAddress("control_listen", options.control_listen));
  LOCKSTEP_ASSIGN_OR_RETURN(options.token, ReadTokenFile("token_file", absl::GetFlag(FLAGS_token_file)));
  LOCKSTEP_ASSIGN_OR_RETURN(options.control_token,
                            ReadTokenFile("control_token_file", absl::GetFlag(FLAGS_control_token_file)));
  LOCKSTEP_ASSIGN_OR_RETURN(options.tls, ReadTlsFiles(absl::GetFlag(FLAGS_tls_cert), absl::GetFlag(FLAGS_tls_key)));
  ServiceLimits& limits = options.limits;
  limits.max_prompt_tokens = absl::GetFlag(FLAGS_max_prompt_tokens);
  limits.max_n = absl::GetFlag(FLAGS_max_n);
  limits.max_request_bytes = absl::GetFlag(FLAGS_max_request_bytes);
  limits.max_waiting_sequences = absl::GetFlag(FLAGS_max_waiting_sequences);
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag<int64_t>("max_prompt_tokens", limits.max_prompt_tokens, 0, int64_t{1} << 32));
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("max_n", limits.max_n, 1, 1 << 16));
  // More could not even wait: not a matter of trying again later.
  if (limits.max_waiting_sequences < limits.max_n) limits.max_n = static_cast<int32_t>(limits.max_waiting_sequences);
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag<int64_t>("max_request_bytes", limits.max_request_bytes, 1024, int64_t{INT32_MAX}));
  const double buffered = absl::GetFlag(FLAGS_max_buffered_mb);
  const double retained = absl::GetFlag(FLAGS_max_retained_mb);
  const double reattach = absl::GetFlag(FLAGS_reattach_seconds);
  const double version_wait = absl::GetFlag(FLAGS_max_version_wait_seconds);
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("max_buffered_mb", buffered, 0.001, kMaxMb));
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("max_retained_mb", retained, 0.0, kMaxMb));
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("reattach_seconds", reattach, 0.0, kMaxSeconds));
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("max_version_wait_seconds", version_wait, 0.0, kMaxSeconds));
  limits.max_buffered_bytes = static_cast<int64_t>(buffered * (1 << 20));
  limits.max_retained_bytes = static_cast<int64_t>(retained * (1 << 20));
  limits.reattach = absl::Seconds(reattach);
  limits.max_version_wait = absl::Seconds(version_wait);
  return options;
}

}  // namespace

absl::StatusOr<WorkerFlags> ParseWorkerFlags(int argc, char** argv) {
  absl::SetProgramUsageMessage("lockstep-worker --model DIR [flags]; see --help");
  if (HasFlag(argc, argv, "help")) {
    PrintHelp();
    std::exit(0);
  }
  if (HasFlag(argc, argv, "version")) {
    std::printf("%s\n", VersionLine().c_str());
    std::exit(0);
  }
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() > 1)
    return absl::InvalidArgumentError(
        absl::StrCat("unexpected argument \"", rest[1], "\"; want flags only (see --help)"));
  WorkerFlags flags;
  LOCKSTEP_ASSIGN_OR_RETURN(flags.worker, ReadWorkerOptions());
  LOCKSTEP_ASSIGN_OR_RETURN(flags.server, ReadServerOptions());
  const double drain = absl::GetFlag(FLAGS_drain_seconds);
  LOCKSTEP_RETURN_IF_ERROR(CheckFlag("drain_seconds", drain, 0.0, kMaxSeconds));
  flags.drain = absl::Seconds(drain);
  return flags;
}

}  // namespace lockstep

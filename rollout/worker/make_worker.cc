#include "rollout/worker/make_worker.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "rollout/base/status.h"
#include "rollout/worker/local_model.h"
#include "rollout/worker/model_tensors.h"
#include "rollout/worker/worker.h"
#include "spdlog/spdlog.h"

namespace lockstep {
namespace {

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(CPU_COUNT(&set), 1) : 1;
}

// bfloat16 weights are served as a bf16 trainer computes on such a device, anything else in fp32. The parse errors are
// LoadModelSpec's to report.
std::string DefaultNumerics(const std::filesystem::path& dir, const std::string& backend) {
  std::ifstream in(dir / "config.json");
  const nlohmann::json config = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return "fp32";
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (config.contains(key) && config[key] == "bfloat16") return backend == "cuda" ? "hf" : "hf-torch";
  }
  return "fp32";
}

absl::Status CheckRange(const char* flag, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--", flag, ": value ", value, " is out of range; want ", low, " to ", high));
}

absl::Status Validate(const WorkerOptions& options) {
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("threads", options.threads, 0, 1024));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("page_size", options.page_size, 16, 1024));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("max_batch_tokens", options.max_batch_tokens, 0, 65536));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("mixed_batch_tokens", options.mixed_batch_tokens, 0, 65536));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("max_sequences", options.max_sequences, 0, 65536));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("max_waiting_sequences", options.max_waiting_sequences, 1, 1 << 24));
  // Written so that NaN fails too.
  if (!(options.memory_gb >= 0 && options.memory_gb <= 1e6)) {
    return absl::InvalidArgumentError(absl::StrCat("--memory_gb: value ", options.memory_gb,
                                                   " is out of range; want 0 (by --memory_fraction) to 1e6"));
  }
  if (!(options.memory_fraction >= 0 && options.memory_fraction <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("--memory_fraction: value ", options.memory_fraction,
                                                   " is out of range; want 0 (the default) to 1"));
  }
  return absl::OkStatus();
}

struct StepLimits {
  int64_t max_batch_tokens = 0;
  int64_t max_sequences = 0;
};

// A decode row for every sequence fits a step; less would hold some back for no reason. What was not given follows what
// was.
absl::StatusOr<StepLimits> LimitsOf(const WorkerOptions& options, bool cuda) {
  const int64_t tokens = options.max_batch_tokens, sequences = options.max_sequences;
  if (tokens > 0 && sequences > tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--max_batch_tokens: value ", tokens, " is below --max_sequences, ",
                                                   sequences, "; want at least a token for each sequence that runs"));
  }
  StepLimits limits{.max_batch_tokens = tokens > 0 ? tokens
                                        : cuda     ? 4096
                                                   : 512,
                    .max_sequences = sequences > 0 ? sequences
                                     : cuda        ? 256
                                                   : 64};
  if (tokens == 0) limits.max_batch_tokens = std::max(limits.max_batch_tokens, sequences);
  if (sequences == 0) limits.max_sequences = std::min(limits.max_sequences, limits.max_batch_tokens);
  return limits;
}

// Of each of the two buffers into which broadcasts go: enough for NCCL's full rate.
constexpr int64_t kCudaInboxBytes = int64_t{256} << 20;
constexpr int64_t kCpuInboxBytes = int64_t{4} << 20;
// What a communicator or two take of the device, left free for them.
constexpr int64_t kNcclBytes = int64_t{512} << 20;

struct UpdateMemory {
  int64_t staging = 0, shadow = 0, inbox = 0, nccl = 0;
  // On a CPU the shadow is of the same memory as the rest.
  int64_t total(bool on_cpu) const { return staging + inbox + nccl + (on_cpu ? shadow : 0); }
};

void LogMemory(const MemoryPlan& plan, const UpdateMemory& update, int64_t page_size, bool on_cpu) {
  const auto mb = [](int64_t bytes) { return absl::StrFormat("%10.1f MB", static_cast<double>(bytes) * 1e-6); };
  spdlog::info("memory: weights      {}", mb(plan.weights));
  if (update.staging > 0) spdlog::info("memory: staging      {}  for weight updates", mb(update.staging));
  if (update.shadow > 0) {
    spdlog::info("memory: shadow       {}  of the weights, to undo an update that fails{}", mb(update.shadow),
                 on_cpu ? "" : "; in host memory, not in the total");
  }
  if (update.inbox > 0) spdlog::info("memory: inbox        {}  for weights by broadcast", mb(update.inbox));
  if (update.nccl > 0) spdlog::info("memory: NCCL         {}  left free for its communicators", mb(update.nccl));
  spdlog::info("memory: activations  {}", mb(plan.activations));
  if (plan.workspace > 0) spdlog::info("memory: workspace    {}", mb(plan.workspace));
  spdlog::info("memory: KV cache     {}  {} pages of {} tokens, {} bytes each", mb(plan.kv_page * plan.kv_pages),
               plan.kv_pages, page_size, plan.kv_page);
  spdlog::info("memory: states       {}  {} slots of {} bytes", mb(plan.state_slot * plan.state_slots),
               plan.state_slots, plan.state_slot);
  if (plan.token_lists > 0) {
    spdlog::info("memory: token lists  {}  {} requests' allowed_token_ids and logit_bias, {} bytes each",
                 mb(plan.token_lists * plan.state_slots), plan.state_slots, plan.token_lists);
  }
  spdlog::info("memory: total        {}{}", mb(plan.total() + update.total(on_cpu)),
               on_cpu ? "  (cache, states and staging become resident as they are used)" : "");
}

// What the worker's thread stands on, released after it has ended.
struct Owned {
  std::unique_ptr<LocalModel> model;
  std::unique_ptr<ModelTensors> tensors;
  std::unique_ptr<Engine> engine;
};

}  // namespace

absl::StatusOr<ServingModel> MakeWorker(const WorkerOptions& options) {
  LOCKSTEP_RETURN_IF_ERROR(Validate(options));
  const bool cuda = options.backend == "cuda";
  LOCKSTEP_ASSIGN_OR_RETURN(const StepLimits limits, LimitsOf(options, cuda));
  const std::string numerics =
      options.numerics.empty() ? DefaultNumerics(options.model_dir, options.backend) : options.numerics;
  const int threads = options.threads == 0 ? UsableCores() : options.threads;
  auto owned = std::make_shared<Owned>();
  LOCKSTEP_ASSIGN_OR_RETURN(owned->model, LoadLocalModel(options.model_dir, numerics, threads,
                                                         {.name = options.backend,
                                                          .device = options.cuda_device,
                                                          .cuda_graphs = options.cuda_graphs,
                                                          .shared_prefix_attention = options.shared_prefix_attention}));
  LocalModel& model = *owned->model;

  // A GPU reads the weights for hundreds of rows in little more than the time it takes for one; a CPU gains nothing.
  const int64_t mixed_batch_tokens = options.mixed_batch_tokens == 0 && cuda ? 512 : options.mixed_batch_tokens;
  if (options.page_size % model.ops().kv_page_multiple() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--page_size: value ", options.page_size,
                                                   " is wrong; want a multiple of ", model.ops().kv_page_multiple()));
  }
  const bool updates = options.weights_receive != WeightsReceive::kOff;
  if (updates) {
    LOCKSTEP_ASSIGN_OR_RETURN(owned->tensors,
                              ModelTensors::Create(options.model_dir, model.spec, model.weights, model.ops(),
                                                   {.direct = options.weights_receive == WeightsReceive::kDirect,
                                                    .inbox_bytes = cuda ? kCudaInboxBytes : kCpuInboxBytes}));
  }
  const int64_t staging = owned->tensors == nullptr ? 0 : owned->tensors->staging_bytes();
  const int64_t shadow = owned->tensors == nullptr ? 0 : owned->tensors->shadow_bytes();
  const int64_t inbox = owned->tensors == nullptr ? 0 : owned->tensors->inbox_bytes();
  // NCCL allocates when a learner has workers join.
  const int64_t nccl = cuda && updates ? kNcclBytes : 0;
  const double fraction = options.memory_fraction > 0 ? options.memory_fraction : cuda ? 0.9 : 0.5;
  const int64_t budget =
      options.memory_gb > 0
          ? static_cast<int64_t>(options.memory_gb * 1e9)
          : static_cast<int64_t>(fraction * static_cast<double>(model.ops().AvailableMemory())) -
                (cuda ? ForwardPass::BufferBytes(model.spec, model.ops(), limits.max_batch_tokens) + nccl
                      : staging);  // of which nothing is resident yet
  LOCKSTEP_ASSIGN_OR_RETURN(const LoopConfig config, FitMemory(model,
                                                               {.page_size = options.page_size,
                                                                .max_batch_tokens = limits.max_batch_tokens,
                                                                .mixed_batch_tokens = mixed_batch_tokens,
                                                                .max_sequences = limits.max_sequences},
                                                               budget, /*min_tokens=*/options.page_size));
  LOCKSTEP_ASSIGN_OR_RETURN(LocalLoop local, MakeLocalLoop(model, config));
  LogMemory(local.engine->memory(), {.staging = staging, .shadow = shadow, .inbox = inbox, .nccl = nccl},
            config.page_size, !cuda);
  spdlog::info("steps: up to {} sequences at once, {} tokens", config.max_sequences, config.max_batch_tokens);

  ServingModel serving;
  serving.name = std::filesystem::weakly_canonical(options.model_dir).filename().string();
  serving.spec = model.spec;
  serving.profile = model.ops().profile();
  serving.device = model.backend->device();
  serving.has_tokenizer = model.token_bytes.has_value();
  serving.max_sequence_tokens =
      local.engine->config().pages == 0
          ? model.spec.max_position
          : std::min(model.spec.max_position, local.engine->config().pages * config.page_size);
  owned->engine = std::move(local.engine);
  serving.tensors = owned->tensors.get();
  serving.weights_receive = options.weights_receive;
  if (owned->tensors != nullptr) {
    serving.install_weights = [tensors = owned->tensors.get()](const WeightVersion& version) {
      return tensors->Install(version);
    };
  }
  // A step of many tokens may take minutes on a CPU.
  const absl::Duration step_timeout = options.step_timeout > absl::ZeroDuration() ? options.step_timeout
                                      : cuda                                      ? absl::Minutes(2)
                                                                                  : absl::InfiniteDuration();
  auto worker = std::make_unique<Worker>(std::move(local.loop), options.max_waiting_sequences, owned, step_timeout);
  serving.control = worker.get();
  serving.worker = std::move(worker);
  return serving;
}

}  // namespace lockstep

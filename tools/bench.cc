// lockstep-bench: the engine's throughput and latency over a grid of batch x context, beside the floor that memory
// sets. No service in between: see tools/bench_cpu for served figures beside a peer's.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"
#include "rollout/base/check.h"
#include "rollout/base/status.h"
#include "rollout/worker/local_model.h"
#include "spdlog/spdlog.h"

ABSL_FLAG(std::string, model, "", "checkpoint directory (required)");
ABSL_FLAG(std::string, numerics, "hf-torch", "numerics profile");
ABSL_FLAG(int32_t, threads, static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())), "threads");
ABSL_FLAG(std::vector<std::string>, batch, std::vector<std::string>({"1", "8", "32"}), "sequences at once");
ABSL_FLAG(std::vector<std::string>, context, std::vector<std::string>({"64", "1024"}), "tokens of every prompt");
ABSL_FLAG(int32_t, steps, 64, "decode steps to time at each point");
ABSL_FLAG(std::string, backend, "cpu", "cpu or cuda");
ABSL_FLAG(bool, cuda_graphs, true, "record decode steps and replay them");
ABSL_FLAG(int32_t, max_batch_tokens, 512, "prefill budget of a step");
ABSL_FLAG(std::string, json, "", "also write the results to this file");

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

double Milliseconds(Clock::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}

struct Point {
  int64_t batch = 0, context = 0;
  double prefill_tok_s = 0;
  double step_ms = 0;  // mean decode step: chunk ends, which the floor counts, fall into one step of 64
  double median_ms = 0;
  double step_ms_max = 0;  // the slowest: a chunk boundary
  double floor_ms = 0;
  double tok_s() const { return static_cast<double>(batch) / step_ms * 1e3; }
};

// What one value head of a GDN layer must move for a new row, mean over the rows of a chunk. fla's program
// (docs/numerics.md): the bf16 image of S, the k, bf16(beta v) and v' of the rows so far, the new ones, and once a
// chunk S in fp32, read and written, and its image; the solve's rows, some 5% more, are left out. Else S in fp32.
double GdnHeadBytes(const GdnShape& shape, GdnProgram program) {
  const double state = static_cast<double>(shape.key_dim * shape.value_dim);
  if (program != GdnProgram::kChunkBf16) return 4 * state;
  const double row = 2.0 * static_cast<double>(shape.key_dim + 2 * shape.value_dim);
  const double chunk_end = (4 + 4 + 2) * state + kGdnChunk * row;
  return 2 * state + (kGdnChunk - 1) / 2.0 * row + row + chunk_end / kGdnChunk;
}

// What a decode step must move, at least: every weight but the embedding table once, and of each sequence its recurrent
// state and the keys and values within its layers' windows.
double FloorBytes(const LocalModel& model, const MemoryPlan& memory, int64_t page_size, int64_t batch,
                  int64_t context) {
  const double weights = static_cast<double>(memory.weights - model.weights.embedding->bytes());
  double state = 0;
  int64_t attention_layers = 0;
  int64_t keys = 0;  // of all attention layers together, that one row sees
  for (const LayerSpec& layer : model.spec.layers) {
    if (layer.mixer == MixerKind::kGatedDeltaNet) {
      state += static_cast<double>(layer.gdn.value_heads) * GdnHeadBytes(layer.gdn, model.ops().profile().gdn);
      continue;
    }
    ++attention_layers;
    const int64_t window = layer.attention.window;
    keys += window > 0 ? std::min(window, context) : context;
  }
  // Every attention layer has the same share of a page.
  const double key = static_cast<double>(memory.kv_page) / static_cast<double>(page_size) /
                     static_cast<double>(std::max<int64_t>(attention_layers, 1));
  return weights + static_cast<double>(batch) * (key * static_cast<double>(keys) + state);
}

absl::StatusOr<Point> Measure(LocalModel& model, int64_t batch, int64_t context, int64_t steps,
                              int64_t max_batch_tokens, double bandwidth) {
  // Sequences whose prompts are done decode on while the others prefill: each may take a token in every such step.
  const int64_t prefill_steps = batch * context / std::max(max_batch_tokens, batch) + 2;
  const int64_t length = context + prefill_steps + steps + 2;
  if (length > model.spec.max_position) {
    return absl::InvalidArgumentError(absl::StrCat("--context: value ", context, " with ", length - context,
                                                   " new tokens exceeds the model's ", model.spec.max_position));
  }
  const LoopConfig config{
      .page_size = 64,
      .max_batch_tokens = std::max(max_batch_tokens, batch),
      .max_sequences = batch,
      .max_kv_tokens = batch * (length + 192)};  // with the page per running sequence that admission leaves free
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, MakeLocalLoop(model, config));
  std::mt19937_64 rng(1);
  for (int64_t i = 0; i < batch; ++i) {
    RequestSpec r;
    r.request_id = absl::StrCat(i);
    for (int64_t t = 0; t < context; ++t)
      r.prompt.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(model.spec.vocab_size)));
    r.max_tokens = prefill_steps + steps + 2;
    r.logprobs = {.temperature = true};
    local.loop->Submit(std::move(r), std::make_shared<CollectingSink>(1), absl::Now());
  }
  Point point{.batch = batch, .context = context};
  auto start = Clock::now();
  // Decode rows ride along in prefill steps, so the prompts are done when every sequence has its first token; later
  // ones count as prefill time too.
  while (local.loop->Load().prefill_tokens < batch * context) local.loop->Step();
  point.prefill_tok_s = static_cast<double>(batch * context) / Milliseconds(Clock::now() - start) * 1e3;
  std::vector<double> times;
  while (static_cast<int64_t>(times.size()) <= steps && local.loop->Load().running_sequences == batch) {
    start = Clock::now();
    local.loop->Step();
    times.push_back(Milliseconds(Clock::now() - start));
  }
  if (times.size() < 2)
    return absl::InvalidArgumentError("--steps: too few; all sequences ended while others prefilled; want more");
  times.erase(times.begin());  // may be the first of its size: recorded, not only run
  std::sort(times.begin(), times.end());
  point.step_ms = std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
  point.median_ms = times[times.size() / 2];
  point.step_ms_max = times.back();
  point.floor_ms = FloorBytes(model, local.engine->memory(), config.page_size, batch, context) / bandwidth * 1e3;
  return point;
}

absl::StatusOr<std::vector<int64_t>> Numbers(const char* flag, const std::vector<std::string>& texts) {
  std::vector<int64_t> values;
  for (const std::string& text : texts) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || value < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, ": value \"", text, "\" is wrong; want positive numbers separated by commas"));
    }
    values.push_back(value);
  }
  return values;
}

absl::Status Bench() {
  const std::string dir = absl::GetFlag(FLAGS_model), numerics = absl::GetFlag(FLAGS_numerics);
  if (dir.empty()) return absl::InvalidArgumentError("--model: missing; want a checkpoint directory");
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> batches, Numbers("batch", absl::GetFlag(FLAGS_batch)));
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> contexts, Numbers("context", absl::GetFlag(FLAGS_context)));
  LOCKSTEP_ASSIGN_OR_RETURN(
      const std::unique_ptr<LocalModel> model,
      LoadLocalModel(dir, numerics, absl::GetFlag(FLAGS_threads),
                     {.name = absl::GetFlag(FLAGS_backend), .cuda_graphs = absl::GetFlag(FLAGS_cuda_graphs)}));
  LOCKSTEP_ASSIGN_OR_RETURN(const double bandwidth, model->backend->MeasureBandwidth());
  std::printf("%s, numerics %s, %s; memory %.1f GB/s\n", dir.c_str(), numerics.c_str(),
              model->backend->device().c_str(), bandwidth * 1e-9);
  std::printf("%8s %9s %15s %11s %11s %11s %12s %11s %7s\n", "batch", "context", "prefill tok/s", "step ms",
              "median ms", "slowest ms", "decode tok/s", "floor ms", "ratio");
  nlohmann::json results = nlohmann::json::array();
  for (int64_t context : contexts) {
    for (int64_t batch : batches) {
      LOCKSTEP_ASSIGN_OR_RETURN(const Point p, Measure(*model, batch, context, absl::GetFlag(FLAGS_steps),
                                                       absl::GetFlag(FLAGS_max_batch_tokens), bandwidth));
      std::printf("%8ld %9ld %15.0f %11.3f %11.3f %11.3f %12.0f %11.3f %7.2f\n", static_cast<long>(batch),
                  static_cast<long>(context), p.prefill_tok_s, p.step_ms, p.median_ms, p.step_ms_max, p.tok_s(),
                  p.floor_ms, p.step_ms / p.floor_ms);
      std::fflush(stdout);
      results.push_back({{"model", std::filesystem::path(dir).filename().string()},
                         {"batch", batch},
                         {"context", context},
                         {"prefill_tok_s", p.prefill_tok_s},
                         {"step_ms", p.step_ms},
                         {"median_step_ms", p.median_ms},
                         {"slowest_step_ms", p.step_ms_max},
                         {"tok_s", p.tok_s()},
                         {"floor_ms", p.floor_ms},
                         {"ratio", p.step_ms / p.floor_ms}});
    }
  }
  const std::string path = absl::GetFlag(FLAGS_json);
  if (path.empty()) return absl::OkStatus();
  std::ofstream out(path);
  out << nlohmann::json{{"device", model->backend->device()},
                        {"threads", model->threads->threads()},
                        {"numerics", numerics},
                        {"read_gb_s", bandwidth * 1e-9},
                        {"results", results}}
             .dump(2)
      << "\n";
  if (!out.flush()) return absl::InternalError(absl::StrCat("--json: cannot write ", path));
  return absl::OkStatus();
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "times prefill and decode steps of the engine over a grid of batch x context.\n"
      "  lockstep-bench --model DIR --batch 1,8,32 --context 64,1024\n"
      "floor: the bytes a decode step must read over the measured read bandwidth; a model that fits the caches may "
      "beat it.");
  absl::ParseCommandLine(argc, argv);
  spdlog::set_level(spdlog::level::warn);
  if (const absl::Status status = lockstep::Bench(); !status.ok()) {
    std::fprintf(stderr, "lockstep-bench: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  return 0;
}

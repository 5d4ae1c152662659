// lockstep-bench: the engine's throughput and latency over a grid of batch x context with the kernels that take the
// time, or of an RL step's rollouts; beside the floor that memory sets. No service in between: see tools/bench_cpu for
// served figures beside a peer's.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "rollout/base/status.h"
#include "rollout/model/forward.h"
#include "rollout/worker/local_model.h"
#include "spdlog/spdlog.h"
#include "tools/bench/cupti_library.h"
#include "tools/bench/point.h"
#include "tools/bench/report.h"
#include "tools/bench/rl_run.h"
#include "tools/bench/rl_schedule.h"

ABSL_FLAG(std::string, model, "", "checkpoint directory (required)");
ABSL_FLAG(std::string, numerics, "hf-torch", "numerics profile");
ABSL_FLAG(int32_t, threads, static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())), "threads");
ABSL_FLAG(std::string, backend, "cpu", "cpu or cuda");
ABSL_FLAG(bool, cuda_graphs, true, "record decode steps and replay them");
ABSL_FLAG(bool, shared_prefix_attention, true, "on cuda: decode reads the keys and values that sequences share once");
ABSL_FLAG(int32_t, max_batch_tokens, 512, "prefill budget of a step");
ABSL_FLAG(std::string, json, "", "also write the results to this file");

ABSL_FLAG(std::vector<std::string>, batch, std::vector<std::string>({"1", "8", "32"}), "grid: sequences at once");
ABSL_FLAG(std::vector<std::string>, context, std::vector<std::string>({"64", "1024"}), "grid: tokens of every prompt");
ABSL_FLAG(int32_t, samples_a_prompt, 1, "grid: sequences of each prompt; every --batch is a multiple");
ABSL_FLAG(int32_t, steps, 64, "grid: decode steps to time at each point");
ABSL_FLAG(bool, profile, true,
          "grid: after the timed runs, the same ones again with the ten kernels that take longest");
ABSL_FLAG(std::string, cupti_library, "", "libcupti.so, for --profile; default: the loader's, else the CUDA toolkit's");

ABSL_FLAG(bool, rl, false, "instead of the grid: an RL step's rollouts, --prompts x --samples, to the end of each");
ABSL_FLAG(int32_t, prompts, 64, "rl: prompts");
ABSL_FLAG(int32_t, samples, 8, "rl: samples of each prompt");
ABSL_FLAG(int32_t, prompt_tokens, 2048, "rl: tokens of every prompt");
ABSL_FLAG(std::vector<std::string>, response, std::vector<std::string>({"1024"}), "rl: tokens of every response");
ABSL_FLAG(double, length_sigma, 0,
          "rl: 0: every response has --response tokens; else log-normal lengths with this sigma, half of --response in "
          "the median and cut off there");
ABSL_FLAG(int32_t, sample_steps, 0,
          "rl: run no more than about 65 steps for each of so many points and integrate; 0: run every step");
ABSL_FLAG(std::vector<std::string>, max_sequences, std::vector<std::string>({"256"}),
          "rl: at once at most, fewer if memory holds fewer: states are set aside for so many. One number, or one for "
          "each --response");
ABSL_FLAG(double, memory_gb, 0, "rl: for KV pages and states, 1e9 bytes; 0: 0.9 of the GPU's or half of the machine's");

namespace lockstep {
namespace {

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

absl::Status CheckNumber(const char* flag, double value, double least) {
  if (value >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--", flag, ": value ", value, " is wrong; want at least ", least));
}

// Profiles of all points, after all points were timed: a recorder that was once on may slow what follows.
void Profile(LocalModel& model, const std::vector<PointShape>& shapes, const std::vector<PointTimes>& times,
             nlohmann::json& results) {
  const auto left_out = [](const std::string& why) {
    std::printf("\nprofile: left out: %s\n", why.c_str());
    std::fflush(stdout);
  };
  if (absl::GetFlag(FLAGS_backend) != "cuda") return left_out("--backend cpu runs no kernels on a device");
  const absl::StatusOr<CuptiLibrary> cupti = CuptiLibrary::Load(absl::GetFlag(FLAGS_cupti_library));
  if (!cupti.ok()) return left_out(std::string(cupti.status().message()));
  for (size_t i = 0; i < shapes.size(); ++i) {
    const absl::StatusOr<PointKernels> kernels = RecordPoint(model, shapes[i], *cupti);
    if (!kernels.ok()) return left_out(std::string(kernels.status().message()));
    const std::string title = absl::StrCat("batch ", shapes[i].batch, ", context ", shapes[i].context);
    PrintKernels(absl::StrCat(title, ", decode"), kernels->decode, times[i].step_ms);
    PrintKernels(absl::StrCat(title, ", prefill"), kernels->prefill, 0);
    results[i]["kernels"] = KernelsJson(kernels->decode, times[i].step_ms);
    results[i]["kernels_us"] = kernels->decode.busy_us();
    results[i]["idle_us"] = kernels->decode.idle_us();
    results[i]["prefill_kernels"] = KernelsJson(kernels->prefill, 0);
  }
}

using Write = absl::FunctionRef<absl::Status(const nlohmann::json& rows)>;

absl::Status RunGrid(LocalModel& model, const std::string& name, double bandwidth, Write write) {
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> batches, Numbers("batch", absl::GetFlag(FLAGS_batch)));
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> contexts, Numbers("context", absl::GetFlag(FLAGS_context)));
  const int64_t samples = absl::GetFlag(FLAGS_samples_a_prompt);
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("samples_a_prompt", static_cast<double>(samples), 1));
  for (const int64_t batch : batches) {
    if (batch % samples == 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--samples_a_prompt: value ", samples, " does not divide ", batch, " of --batch"));
  }
  PrintPointHeader();
  std::vector<PointShape> shapes;
  std::vector<PointTimes> times;
  nlohmann::json results = nlohmann::json::array();
  for (const int64_t context : contexts) {
    for (const int64_t batch : batches) {
      shapes.push_back({.batch = batch,
                        .context = context,
                        .samples = samples,
                        .steps = absl::GetFlag(FLAGS_steps),
                        .max_batch_tokens = absl::GetFlag(FLAGS_max_batch_tokens)});
      LOCKSTEP_ASSIGN_OR_RETURN(const PointTimes point, TimePoint(model, shapes.back(), bandwidth));
      times.push_back(point);
      PrintPoint(shapes.back(), point);
      results.push_back(PointJson(name, shapes.back(), point));
    }
  }
  if (absl::GetFlag(FLAGS_profile)) Profile(model, shapes, times, results);
  return write(results);
}

// A run takes long: `write` gets the rows so far after each.
absl::Status RunRlRows(LocalModel& model, const std::string& name, double bandwidth, Write write) {
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> responses, Numbers("response", absl::GetFlag(FLAGS_response)));
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> most,
                            Numbers("max_sequences", absl::GetFlag(FLAGS_max_sequences)));
  if (most.size() != 1 && most.size() != responses.size()) {
    return absl::InvalidArgumentError(absl::StrCat("--max_sequences: ", most.size(), " values for ", responses.size(),
                                                   " of --response; want one, or as many"));
  }
  const int64_t prompts = absl::GetFlag(FLAGS_prompts), samples = absl::GetFlag(FLAGS_samples);
  const int64_t prompt_tokens = absl::GetFlag(FLAGS_prompt_tokens);
  const double sigma = absl::GetFlag(FLAGS_length_sigma);
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("prompts", static_cast<double>(prompts), 1));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("samples", static_cast<double>(samples), 1));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("prompt_tokens", static_cast<double>(prompt_tokens), 1));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("length_sigma", sigma, 0));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("sample_steps", absl::GetFlag(FLAGS_sample_steps), 0));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("max_batch_tokens", absl::GetFlag(FLAGS_max_batch_tokens), 1));
  LOCKSTEP_RETURN_IF_ERROR(CheckNumber("memory_gb", absl::GetFlag(FLAGS_memory_gb), 0));
  const int64_t sample_steps = absl::GetFlag(FLAGS_sample_steps);
  if (sample_steps > 0 && absl::GetFlag(FLAGS_backend) == "cpu" && MakeStateLayout(model.spec, model.ops()).bytes > 0) {
    return absl::InvalidArgumentError(
        "--sample_steps: on --backend cpu a recurrent state must have seen every row before the one it is asked for; "
        "leave the flag out to run every step");
  }
  nlohmann::json rows = nlohmann::json::array();
  for (size_t i = 0; i < responses.size(); ++i) {
    const int64_t response = responses[i];
    const int64_t tokens = prompt_tokens + response;
    if (tokens > model.spec.max_position) {
      return absl::InvalidArgumentError(absl::StrCat("--response: value ", response, " after prompts of ",
                                                     prompt_tokens, " tokens exceeds the model's ",
                                                     model.spec.max_position));
    }
    RlRow row{.model = name, .response = response, .sigma = sigma};
    row.options.shape = {.prompts = prompts,
                         .samples = samples,
                         .prompt_tokens = prompt_tokens,
                         .lengths = DrawLengths(prompts * samples, response, sigma)};
    row.options.sample_steps = sample_steps;
    const int64_t sequences = std::min(most[most.size() == 1 ? 0 : i], prompts * samples);
    LOCKSTEP_ASSIGN_OR_RETURN(
        row.options.loop,
        FitRlMemory(model,
                    {.max_batch_tokens = std::max<int64_t>(absl::GetFlag(FLAGS_max_batch_tokens), sequences),
                     .max_sequences = sequences},
                    absl::GetFlag(FLAGS_memory_gb), tokens));
    row.fits = SequencesThatFit(model, row.options.loop, tokens);
    if (rows.empty()) PrintRlHeader(row.options);
    LOCKSTEP_ASSIGN_OR_RETURN(row.result, RunRl(model, row.options, bandwidth));
    PrintRl(row);
    rows.push_back(RlJson(row));
    LOCKSTEP_RETURN_IF_ERROR(write(rows));
  }
  return absl::OkStatus();
}

absl::Status Bench() {
  const std::string dir = absl::GetFlag(FLAGS_model), numerics = absl::GetFlag(FLAGS_numerics);
  if (dir.empty()) return absl::InvalidArgumentError("--model: missing; want a checkpoint directory");
  LOCKSTEP_ASSIGN_OR_RETURN(const std::unique_ptr<LocalModel> model,
                            LoadLocalModel(dir, numerics, absl::GetFlag(FLAGS_threads),
                                           {.name = absl::GetFlag(FLAGS_backend),
                                            .cuda_graphs = absl::GetFlag(FLAGS_cuda_graphs),
                                            .shared_prefix_attention = absl::GetFlag(FLAGS_shared_prefix_attention)}));
  LOCKSTEP_ASSIGN_OR_RETURN(const double bandwidth, model->backend->MeasureBandwidth());
  std::printf("%s, numerics %s, %s; memory %.1f GB/s\n", dir.c_str(), numerics.c_str(),
              model->backend->device().c_str(), bandwidth * 1e-9);
  const bool rl = absl::GetFlag(FLAGS_rl);
  const std::string name = std::filesystem::path(dir).filename().string();
  const auto write = [&](const nlohmann::json& rows) -> absl::Status {
    const std::string path = absl::GetFlag(FLAGS_json);
    if (path.empty()) return absl::OkStatus();
    std::ofstream out(path);
    out << nlohmann::json{{"device", model->backend->device()},
                          {"threads", model->threads->threads()},
                          {"numerics", numerics},
                          {"read_gb_s", bandwidth * 1e-9},
                          {rl ? "rl" : "results", rows}}
               .dump(2)
        << "\n";
    if (!out.flush()) return absl::InternalError(absl::StrCat("--json: cannot write ", path));
    return absl::OkStatus();
  };
  return rl ? RunRlRows(*model, name, bandwidth, write) : RunGrid(*model, name, bandwidth, write);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "times prefill and decode steps of the engine over a grid of batch x context.\n"
      "  lockstep-bench --model DIR --batch 1,8,32 --context 64,1024\n"
      "  lockstep-bench --model DIR --rl --prompts 64 --samples 8 --response 1024,16384 --sample_steps 12\n"
      "floor: the bytes a step must move over the measured bandwidth; a model that fits the caches may beat it.\n"
      "docs/performance.md says how floors are counted and how to read the profile.");
  absl::ParseCommandLine(argc, argv);
  spdlog::set_level(spdlog::level::warn);
  try {
    if (const absl::Status status = lockstep::Bench(); !status.ok()) {
      std::fprintf(stderr, "lockstep-bench: %s\n", std::string(status.message()).c_str());
      return 2;
    }
  } catch (const std::exception& error) {  // of the JSON library, and of memory that is not there
    std::fprintf(stderr, "lockstep-bench: %s\n", error.what());
    return 2;
  }
  return 0;
}

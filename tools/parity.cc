// lockstep-parity: shows that a checkpoint's log-probabilities do not depend on how they were computed. Generates
// completions alone, scores them teacher-forced, and generates them again in other batches, prefill budgets, page
// sizes, thread counts and orders, with preemption; then compares bits.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/str_cat.h"
#include "rollout/base/status.h"
#include "rollout/worker/local_model.h"
#include "spdlog/spdlog.h"

ABSL_FLAG(std::string, model, "", "checkpoint directory (required)");
ABSL_FLAG(std::string, numerics, "hf-torch", "numerics profile");
ABSL_FLAG(int32_t, threads, static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())), "threads");
ABSL_FLAG(std::string, backend, "cpu", "cpu or cuda");
ABSL_FLAG(bool, cuda_graphs, true, "on cuda: record decode steps and replay them");
ABSL_FLAG(bool, shared_prefix_attention, true, "on cuda: decode reads the keys and values that sequences share once");
ABSL_FLAG(int32_t, prompts, 16, "random prompts, of 1 to --prompt_tokens tokens");
ABSL_FLAG(int32_t, prompt_tokens, 200, "longest prompt");
ABSL_FLAG(int32_t, max_tokens, 96, "generated tokens a prompt");
ABSL_FLAG(int32_t, schedules, 8, "random schedules to repeat the generation in");
ABSL_FLAG(int32_t, sequences, 32, "most sequences at once in a schedule");
ABSL_FLAG(int32_t, log2_budget, 10, "largest prefill budget of a schedule, as a power of 2");
ABSL_FLAG(float, temperature, 1.0f, "sampling temperature");
ABSL_FLAG(uint64_t, seed, 1, "of prompts, draws and schedules");

namespace lockstep {
namespace {

struct Options {
  int prompts, prompt_tokens, max_tokens, schedules, sequences, log2_budget;
  float temperature;
  uint64_t seed;
};

// What one comparison found. Bits are compared as integers: -0 and 0 differ, and NaN equals itself.
struct Comparison {
  std::string what;
  int64_t tokens = 0;
  int64_t differing_tokens = 0;    // other token drawn
  int64_t differing_logprobs = 0;  // other bits
  double max_difference = 0;

  bool equal() const { return differing_tokens == 0 && differing_logprobs == 0; }
  void Add(float a, float b) {
    ++tokens;
    if (std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b)) return;
    ++differing_logprobs;
    max_difference = std::max(max_difference, std::fabs(static_cast<double>(a) - static_cast<double>(b)));
  }
  void Print() const {
    std::printf("%-78s %8ld tokens  %6ld differ  %6ld logprobs differ  max |d| %.3g\n", what.c_str(),
                static_cast<long>(tokens), static_cast<long>(differing_tokens), static_cast<long>(differing_logprobs),
                max_difference);
    std::fflush(stdout);
  }
};

std::vector<RequestSpec> MakeRequests(const ModelSpec& spec, const Options& options) {
  std::mt19937_64 rng(options.seed);
  std::vector<RequestSpec> requests;
  for (int i = 0; i < options.prompts; ++i) {
    RequestSpec r;
    r.request_id = absl::StrCat("prompt-", i);
    const int64_t length = 1 + static_cast<int64_t>(rng() % static_cast<uint64_t>(options.prompt_tokens));
    for (int64_t t = 0; t < length; ++t)
      r.prompt.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(spec.vocab_size)));
    r.n = i % 4 == 3 ? 3 : 1;  // some are groups, whose samples fork from one prefill
    r.max_tokens = options.max_tokens;
    r.sampling.temperature = options.temperature;
    r.sampling.seed = options.seed + static_cast<uint64_t>(i);
    r.logprobs = {.raw = true, .temperature = true, .processed = true};
    requests.push_back(std::move(r));
  }
  return requests;
}

void Compare(const CollectingSink& want, const CollectingSink& got, Comparison& out) {
  for (size_t s = 0; s < want.samples().size(); ++s) {
    const CollectedSample &a = want.samples()[s], &b = got.samples()[s];
    const size_t common = std::min(a.tokens.size(), b.tokens.size());
    out.differing_tokens += static_cast<int64_t>(std::max(a.tokens.size(), b.tokens.size()) - common);
    for (size_t t = 0; t < common; ++t) {
      out.differing_tokens += a.tokens[t] != b.tokens[t];
      out.Add(a.logprobs[t].raw, b.logprobs[t].raw);
    }
  }
}

absl::StatusOr<std::vector<std::shared_ptr<CollectingSink>>> Run(LocalModel& model, const LoopConfig& config,
                                                                 const std::vector<RequestSpec>& requests) {
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, MakeLocalLoop(model, config));
  return RunAll(*local.loop, requests);
}

absl::StatusOr<bool> CheckParity(const std::string& dir, const std::string& numerics, int threads,
                                 const Options& options) {
  const BackendOptions backend{.name = absl::GetFlag(FLAGS_backend),
                               .cuda_graphs = absl::GetFlag(FLAGS_cuda_graphs),
                               .shared_prefix_attention = absl::GetFlag(FLAGS_shared_prefix_attention)};
  LOCKSTEP_ASSIGN_OR_RETURN(const std::unique_ptr<LocalModel> model, LoadLocalModel(dir, numerics, threads, backend));
  // On a device the number of host threads computes nothing.
  std::unique_ptr<LocalModel> single;
  if (backend.name == "cpu") {
    LOCKSTEP_ASSIGN_OR_RETURN(single, LoadLocalModel(dir, numerics, 1, backend));
  }
  const std::vector<RequestSpec> requests = MakeRequests(model->spec, options);
  const int64_t longest = options.prompt_tokens + options.max_tokens;
  const LoopConfig alone{
      .page_size = 64, .max_batch_tokens = longest, .max_sequences = 4, .max_kv_tokens = 4 * longest + 256};

  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop alone_loop, MakeLocalLoop(*model, alone));
  std::vector<std::shared_ptr<CollectingSink>> expected;
  for (const RequestSpec& request : requests) {
    const auto sinks = RunAll(*alone_loop.loop, {request});
    for (const CollectedSample& sample : sinks[0]->samples()) {
      if (sample.result.finish == FinishKind::kAborted) {
        return absl::InternalError(absl::StrCat(request.request_id, ": ", sample.result.abort_message));
      }
    }
    expected.push_back(sinks[0]);
  }

  std::printf(
      "%s, numerics %s: %d prompts of up to %d tokens, %d new tokens, temperature %g; the reference runs each prompt "
      "alone, prefilled in one piece\n",
      dir.c_str(), numerics.c_str(), options.prompts, options.prompt_tokens, options.max_tokens,
      static_cast<double>(options.temperature));
  std::vector<Comparison> comparisons;

  Comparison score{.what = "Score of the same tokens"};
  for (size_t i = 0; i < requests.size(); ++i) {
    for (const CollectedSample& sample : expected[i]->samples()) {
      RequestSpec forced;
      forced.request_id = "score";
      forced.prompt = requests[i].prompt;
      forced.prompt.insert(forced.prompt.end(), sample.tokens.begin(), sample.tokens.end());
      forced.n = 0;
      forced.sampling.temperature = options.temperature;
      forced.logprobs = {.raw = true, .temperature = true};
      forced.prompt_logprobs = {static_cast<int64_t>(requests[i].prompt.size()),
                                static_cast<int64_t>(forced.prompt.size())};
      const auto sinks = RunAll(*alone_loop.loop, {forced});
      for (size_t t = 0; t < sample.tokens.size(); ++t)
        score.Add(sample.logprobs[t].raw, sinks[0]->prompt_logprobs()[t].raw);
    }
  }
  comparisons.push_back(score);
  comparisons.back().Print();

  std::mt19937_64 rng(options.seed + 1);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng() % static_cast<uint64_t>(high - low + 1));
  };
  for (int s = 0; s < options.schedules; ++s) {
    LoopConfig config{.page_size = model->ops().kv_page_multiple() << pick(0, 2),
                      .max_batch_tokens = 1 << pick(2, options.log2_budget),
                      .mixed_batch_tokens = pick(0, 1) * pick(1, 512),
                      .max_sequences = pick(1, options.sequences),
                      .max_kv_tokens = 0};
    const bool tight = s % 2 == 1;  // memory for about two sequences: preemption and recomputation
    config.max_kv_tokens = tight ? 2 * longest + 2 * config.page_size : longest * options.sequences;
    if (s % 4 >= 2) config.disturb_seed = rng();
    LocalModel& m = s % 3 == 2 && single != nullptr ? *single : *model;
    std::vector<size_t> order(requests.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    std::vector<RequestSpec> shuffled;
    for (size_t i : order) shuffled.push_back(requests[i]);
    LOCKSTEP_ASSIGN_OR_RETURN(auto sinks, Run(m, config, shuffled));
    Comparison c;
    int64_t preemptions = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      Compare(*expected[order[i]], *sinks[i], c);
      for (const CollectedSample& sample : sinks[i]->samples()) preemptions += sample.result.counters.preemptions;
    }
    c.what = absl::StrCat("batch of ", config.max_sequences, ", budget ", config.max_batch_tokens, ", page ",
                          config.page_size, ", threads ", m.threads->threads(),
                          config.disturb_seed ? ", disturbed" : "", ", ", preemptions, " preemptions");
    comparisons.push_back(c);
    comparisons.back().Print();
  }

  Comparison total{.what = "all"};
  for (const Comparison& c : comparisons) {
    total.tokens += c.tokens;
    total.differing_tokens += c.differing_tokens;
    total.differing_logprobs += c.differing_logprobs;
    total.max_difference = std::max(total.max_difference, c.max_difference);
  }
  total.Print();
  std::printf(total.equal() ? "INVARIANT: zero differing bits\n" : "NOT INVARIANT\n");
  return total.equal();
}

absl::StatusOr<Options> ReadOptions() {
  const Options o{absl::GetFlag(FLAGS_prompts),     absl::GetFlag(FLAGS_prompt_tokens),
                  absl::GetFlag(FLAGS_max_tokens),  absl::GetFlag(FLAGS_schedules),
                  absl::GetFlag(FLAGS_sequences),   absl::GetFlag(FLAGS_log2_budget),
                  absl::GetFlag(FLAGS_temperature), absl::GetFlag(FLAGS_seed)};
  const auto check = [](const char* flag, int value, int low, int high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, ": value ", value, " is out of range; want ", low, " to ", high));
  };
  LOCKSTEP_RETURN_IF_ERROR(check("prompts", o.prompts, 1, 100000));
  LOCKSTEP_RETURN_IF_ERROR(check("prompt_tokens", o.prompt_tokens, 1, 1 << 20));
  LOCKSTEP_RETURN_IF_ERROR(check("max_tokens", o.max_tokens, 1, 1 << 20));
  LOCKSTEP_RETURN_IF_ERROR(check("schedules", o.schedules, 1, 100000));
  LOCKSTEP_RETURN_IF_ERROR(check("sequences", o.sequences, 1, 4096));
  LOCKSTEP_RETURN_IF_ERROR(check("log2_budget", o.log2_budget, 2, 14));
  LOCKSTEP_RETURN_IF_ERROR(check("threads", absl::GetFlag(FLAGS_threads), 1, 1024));
  if (!(o.temperature >= 0))
    return absl::InvalidArgumentError(
        absl::StrCat("--temperature: value ", o.temperature, " is wrong; want 0 or more"));
  if (absl::GetFlag(FLAGS_model).empty())
    return absl::InvalidArgumentError("--model: missing; want a checkpoint directory");
  return o;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "checks that a checkpoint's tokens and log-probabilities do not depend on how they were computed.\n"
      "  lockstep-parity --model DIR\n"
      "Exit status: 0 no bit differs, 1 some do, 2 it could not run.");
  absl::ParseCommandLine(argc, argv);
  spdlog::set_level(spdlog::level::warn);
  const absl::StatusOr<lockstep::Options> options = lockstep::ReadOptions();
  const absl::StatusOr<bool> equal =
      options.ok() ? lockstep::CheckParity(absl::GetFlag(FLAGS_model), absl::GetFlag(FLAGS_numerics),
                                           absl::GetFlag(FLAGS_threads), *options)
                   : options.status();
  if (!equal.ok()) {
    std::fprintf(stderr, "lockstep-parity: %s\n", std::string(equal.status().message()).c_str());
    return 2;
  }
  return *equal ? 0 : 1;
}

// lockstep-trace: runs a sequence through the engine and writes what every operation computed at chosen positions, for
// tools/trace_compare.py.
#include "rollout/model/trace.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"
#include "rollout/base/status.h"
#include "rollout/worker/local_model.h"
#include "spdlog/spdlog.h"

ABSL_FLAG(std::string, model, "", "checkpoint directory (required)");
ABSL_FLAG(std::string, backend, "cpu", "cpu or cuda");
ABSL_FLAG(std::string, numerics, "hf", "numerics profile");
ABSL_FLAG(int32_t, threads, static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())), "threads");
ABSL_FLAG(std::string, tokens, "", "JSON file with a list of token ids (required)");
ABSL_FLAG(std::vector<std::string>, positions, {}, "positions to trace (required)");
ABSL_FLAG(int32_t, max_batch_tokens, 512, "rows of a step; 1 decodes every position");
ABSL_FLAG(std::string, out, "", "folder to write (required)");

namespace lockstep {
namespace {

absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& path, const ModelSpec& spec) {
  std::ifstream in(path);
  const nlohmann::json json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!json.is_array() || json.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens: \"", path, "\" does not hold a JSON list of token ids"));
  }
  std::vector<int32_t> tokens;
  for (const auto& token : json) {
    if (!token.is_number_integer() || token < 0 || token >= spec.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("--tokens: entry ", tokens.size(), " is ", token.dump(), "; want 0 to ", spec.vocab_size - 1));
    }
    tokens.push_back(token);
  }
  return tokens;
}

absl::StatusOr<std::vector<int64_t>> ReadPositions(const std::vector<std::string>& texts, int64_t count) {
  std::vector<int64_t> positions;
  for (const std::string& text : texts) {
    int64_t position = 0;
    if (!absl::SimpleAtoi(text, &position) || position < 0 || position >= count) {
      return absl::InvalidArgumentError(
          absl::StrCat("--positions: value \"", text, "\" is wrong; want 0 to ", count - 1));
    }
    positions.push_back(position);
  }
  if (positions.empty()) return absl::InvalidArgumentError("--positions: missing; want numbers separated by commas");
  std::sort(positions.begin(), positions.end());
  return positions;
}

absl::Status Run() {
  const std::string dir = absl::GetFlag(FLAGS_model), out = absl::GetFlag(FLAGS_out);
  if (dir.empty()) return absl::InvalidArgumentError("--model: missing; want a checkpoint directory");
  if (out.empty()) return absl::InvalidArgumentError("--out: missing; want a folder");
  const int64_t rows = absl::GetFlag(FLAGS_max_batch_tokens);
  if (rows < 1) return absl::InvalidArgumentError(absl::StrCat("--max_batch_tokens: value ", rows, "; want 1 or more"));
  // A recorded step computes without coming by here.
  LOCKSTEP_ASSIGN_OR_RETURN(const std::unique_ptr<LocalModel> model,
                            LoadLocalModel(dir, absl::GetFlag(FLAGS_numerics), absl::GetFlag(FLAGS_threads),
                                           {.name = absl::GetFlag(FLAGS_backend), .cuda_graphs = false}));
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadTokens(absl::GetFlag(FLAGS_tokens), model->spec));
  const int64_t count = static_cast<int64_t>(tokens.size());
  LOCKSTEP_ASSIGN_OR_RETURN(const std::vector<int64_t> positions, ReadPositions(absl::GetFlag(FLAGS_positions), count));
  const int64_t page_size = 64;
  LOCKSTEP_ASSIGN_OR_RETURN(const LocalLoop local, MakeLocalLoop(*model, {.page_size = page_size,
                                                                          .max_batch_tokens = rows,
                                                                          .max_sequences = 1,
                                                                          .max_kv_tokens = count + 2 * page_size}));
  Trace trace(positions);
  local.engine->set_trace(&trace);
  // One new token, so that the last position's logits are computed too.
  RequestSpec request;
  request.request_id = "trace";
  request.prompt = tokens;
  request.max_tokens = 1;
  request.sampling.temperature = 0;
  request.logprobs = {.raw = true};
  request.prompt_logprobs = {1, count};
  const auto sinks = RunAll(*local.loop, {request});
  LOCKSTEP_RETURN_IF_ERROR(local.loop->failure());
  if (sinks[0]->samples()[0].result.finish == FinishKind::kAborted) {
    return absl::InternalError(sinks[0]->samples()[0].result.abort_message);
  }
  return trace.Write(out,
                     absl::StrCat("lockstep-trace, ", model->backend->device(), ", numerics ",
                                  absl::GetFlag(FLAGS_numerics), ", ", rows, " rows a step"),
                     tokens);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "writes what every operation computed at chosen positions of a sequence (docs/trace.md).\n"
      "  lockstep-trace --model DIR --tokens tokens.json --positions 0,63,64 --out FOLDER");
  absl::ParseCommandLine(argc, argv);
  spdlog::set_level(spdlog::level::warn);
  if (const absl::Status status = lockstep::Run(); !status.ok()) {
    std::fprintf(stderr, "lockstep-trace: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  return 0;
}

#include "tools/bench/report.h"

#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lockstep {
namespace {

constexpr size_t kKernels = 10;

std::string Rate(const std::optional<double>& rate, const char* format) {
  if (!rate) return "-";
  char text[32];
  std::snprintf(text, sizeof(text), format, *rate);
  return text;
}

double ShareOf(double us, const KernelTable& table, double step_ms) {
  return us / (step_ms > 0 ? step_ms * 1e3 : table.busy_us());
}

struct RlFigures {
  double tok_s, floor_tok_s, ratio, mean_batch, gpu_hours;
};
RlFigures FiguresOf(const RlRow& row) {
  const auto tokens = static_cast<double>(row.options.shape.generated());
  const RlResult& r = row.result;
  return {.tok_s = tokens / r.seconds,
          .floor_tok_s = tokens / r.floor_seconds,
          .ratio = r.seconds / r.floor_seconds,
          .mean_batch = tokens / static_cast<double>(r.walk.steps.size()),
          .gpu_hours = r.seconds / 3600};
}

std::string MethodText(const RlRow& row) {
  const auto steps = static_cast<int64_t>(row.result.walk.steps.size());
  if (row.options.sample_steps == 0) return absl::StrCat("every one of ", steps, " steps run");
  return absl::StrCat(
      "integrated from ", row.result.measured_steps, " measured steps of ", steps,
      ": the scheduler's own steps, walked without a device; some run on it. Decode steps: time over floor of ",
      row.options.sample_steps,
      " windows of 64, interpolated, times each step's floor. Prefill: time beyond that, a prefill row.");
}

}  // namespace

void PrintPointHeader() {
  std::printf("%8s %9s %15s %11s %11s %11s %12s %11s %7s\n", "batch", "context", "prefill tok/s", "step ms",
              "median ms", "slowest ms", "decode tok/s", "floor ms", "ratio");
}

void PrintPoint(const PointShape& shape, const PointTimes& times) {
  std::printf("%8ld %9ld %15.0f %11.3f %11.3f %11.3f %12.0f %11.3f %7.2f\n", static_cast<long>(shape.batch),
              static_cast<long>(shape.context), times.prefill_tok_s, times.step_ms, times.median_ms, times.slowest_ms,
              static_cast<double>(shape.batch) / times.step_ms * 1e3, times.floor_ms, times.ratio());
  std::fflush(stdout);
}

nlohmann::json PointJson(const std::string& model, const PointShape& shape, const PointTimes& times) {
  return {{"model", model},
          {"batch", shape.batch},
          {"context", shape.context},
          {"samples_a_prompt", shape.samples},
          {"prefill_tok_s", times.prefill_tok_s},
          {"step_ms", times.step_ms},
          {"median_step_ms", times.median_ms},
          {"slowest_step_ms", times.slowest_ms},
          {"tok_s", static_cast<double>(shape.batch) / times.step_ms * 1e3},
          {"floor_ms", times.floor_ms},
          {"ratio", times.ratio()}};
}

void PrintKernels(const std::string& title, const KernelTable& table, double step_ms) {
  std::printf("\n%s: kernels %.1f us a step", title.c_str(), table.busy_us());
  if (step_ms > 0) std::printf(" of %.1f timed", step_ms * 1e3);
  std::printf("; recorded, %.1f between them", table.idle_us());
  std::printf("\n  %-48s %-14s %8s %10s %6s %7s %8s %9s\n", "kernel", "operation", "calls", "us", "share", "GB/s",
              "TFLOP/s", "idle us");
  for (const KernelTable::Row& row : table.Top(kKernels)) {
    std::printf("  %-48s %-14s %8.1f %10.1f %5.1f%% %7s %8s %9.1f\n", row.kernel.c_str(), row.operation.c_str(),
                row.calls, row.us, 100 * ShareOf(row.us, table, step_ms), Rate(row.gb_s, "%.0f").c_str(),
                Rate(row.tflop_s, "%.1f").c_str(), row.idle_us);
  }
  std::fflush(stdout);
}

nlohmann::json KernelsJson(const KernelTable& table, double step_ms) {
  nlohmann::json kernels = nlohmann::json::array();
  for (const KernelTable::Row& row : table.Top(kKernels)) {
    nlohmann::json& entry = kernels.emplace_back(nlohmann::json{{"kernel", row.kernel},
                                                                {"operation", row.operation},
                                                                {"calls", row.calls},
                                                                {"us", row.us},
                                                                {"idle_us", row.idle_us},
                                                                {"share", ShareOf(row.us, table, step_ms)}});
    if (row.gb_s) entry["gb_s"] = *row.gb_s;
    if (row.tflop_s) entry["tflop_s"] = *row.tflop_s;
  }
  return kernels;
}

void PrintRlHeader(const RlOptions& options) {
  std::printf("%ld prompts of %ld tokens x %ld samples\n", static_cast<long>(options.shape.prompts),
              static_cast<long>(options.shape.prompt_tokens), static_cast<long>(options.shape.samples));
  std::printf("%9s %6s %6s %10s %9s %9s %9s %11s %10s %11s %7s %10s\n", "response", "fit", "peak", "mean batch",
              "preempted", "steps", "measured", "seconds", "tok/s", "floor tok/s", "ratio", "GPU-hours");
}

void PrintRl(const RlRow& row) {
  const RlFigures f = FiguresOf(row);
  const RlWalk& walk = row.result.walk;
  std::printf("%9ld %6ld %6ld %10.1f %9ld %9ld %9ld %11.2f %10.0f %11.0f %7.2f %10.4f\n",
              static_cast<long>(row.response), static_cast<long>(row.fits), static_cast<long>(walk.peak_running),
              f.mean_batch, static_cast<long>(walk.preemptions), static_cast<long>(walk.steps.size()),
              static_cast<long>(row.result.measured_steps), row.result.seconds, f.tok_s, f.floor_tok_s, f.ratio,
              f.gpu_hours);
  std::printf("          %s\n", MethodText(row).c_str());
  std::fflush(stdout);
}

nlohmann::json RlJson(const RlRow& row) {
  const RlFigures f = FiguresOf(row);
  const RlShape& shape = row.options.shape;
  const RlWalk& walk = row.result.walk;
  nlohmann::json json = {{"model", row.model},
                         {"prompts", shape.prompts},
                         {"samples", shape.samples},
                         {"prompt_tokens", shape.prompt_tokens},
                         {"response_tokens", row.response},
                         {"length_sigma", row.sigma},
                         {"generated_tokens", shape.generated()},
                         {"max_batch_tokens", row.options.loop.max_batch_tokens},
                         {"max_sequences", row.options.loop.max_sequences},
                         {"max_kv_tokens", row.options.loop.max_kv_tokens},
                         {"sequences_fit", row.fits},
                         {"peak_sequences", walk.peak_running},
                         {"mean_batch", f.mean_batch},
                         {"preemptions", walk.preemptions},
                         {"steps", walk.steps.size()},
                         {"mixed_steps", walk.mixed_steps()},
                         {"prefill_rows", walk.prefill_rows()},
                         {"method", MethodText(row)},
                         {"measured_steps", row.result.measured_steps},
                         {"seconds", row.result.seconds},
                         {"tok_s", f.tok_s},
                         {"floor_seconds", row.result.floor_seconds},
                         {"floor_tok_s", f.floor_tok_s},
                         {"ratio", f.ratio},
                         {"gpu_hours", f.gpu_hours}};
  if (row.options.sample_steps > 0) {
    json["decode_ratio_min"] = row.result.ratio_min;
    json["decode_ratio_max"] = row.result.ratio_max;
    json["prefill_row_us"] = row.result.prefill_row_seconds * 1e6;
  }
  return json;
}

}  // namespace lockstep

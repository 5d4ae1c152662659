#include "sampler/row_sampler.h"

#include <utility>

namespace lockstep {
namespace {

class CpuRowSampler final : public RowSampler {
 public:
  explicit CpuRowSampler(ThreadPool& threads) : threads_(threads), scratch_(threads.threads()) {}

  void Enqueue(Rows logits, std::span<const SampleTask> tasks) override {
    const size_t first = results_.size();
    results_.resize(first + tasks.size(), absl::UnknownError("not run"));
    threads_.ParallelFor(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const std::span<const float> row(logits.row(tasks[i].logits_row), logits.width);
        results_[first + i] = Run(row, *tasks[i].task, scratch_[thread]);
      }
    });
  }

  absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> Collect() override { return std::exchange(results_, {}); }

 private:
  static absl::StatusOr<SampledToken> Run(std::span<const float> row, const RowTask& task, SamplerScratch& scratch) {
    if (!task.forced) return SampleRow(row, *task.params, *task.options, *task.history, task.key, scratch);
    absl::StatusOr<RowLogprobs> scored =
        ScoreRow(row, task.forced_token, *task.params, *task.options, *task.history, scratch);
    if (!scored.ok()) return scored.status();
    return SampledToken{task.forced_token, *std::move(scored)};
  }

  ThreadPool& threads_;
  std::vector<SamplerScratch> scratch_;  // by thread
  std::vector<absl::StatusOr<SampledToken>> results_;
};

}  // namespace

std::unique_ptr<RowSampler> MakeCpuRowSampler(ThreadPool& threads) {
  return std::make_unique<CpuRowSampler>(threads);
}

}  // namespace lockstep

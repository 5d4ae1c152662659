#include "rollout/server/logprob_columns.h"

#include <limits>
#include <numeric>

namespace lockstep {
namespace {

void AppendTop(const std::vector<TokenLogprob>& row, int32_t width, std::vector<int32_t>& ids,
               std::vector<float>& logprobs) {
  for (int32_t i = 0; i < width; ++i) {
    const bool present = i < static_cast<int32_t>(row.size());
    ids.push_back(present ? row[i].token : -1);
    logprobs.push_back(present ? row[i].logprob : -std::numeric_limits<float>::infinity());
  }
}

template <class T>
void AppendRows(const std::vector<T>& from, int64_t begin, int64_t end, int64_t width, std::vector<T>& to) {
  to.insert(to.end(), from.begin() + begin * width, from.begin() + end * width);
}

}  // namespace

void LogprobColumns::Append(const RowLogprobs& row, const LogprobLayout& layout) {
  if (layout.raw) {
    raw.push_back(row.raw);
    AppendTop(row.top_raw, layout.top_k, top_raw_ids, top_raw);
  }
  if (layout.temperature) {
    temperature.push_back(row.temperature);
    AppendTop(row.top_temperature, layout.top_k, top_temperature_ids, top_temperature);
  }
  if (layout.processed) {
    processed.push_back(row.processed);
    AppendTop(row.top_processed, layout.top_k, top_processed_ids, top_processed);
  }
  if (layout.kept) {
    const bool all = static_cast<int64_t>(row.kept_token_ids.size()) == layout.vocab_size;
    kept_counts.push_back(all ? 0 : static_cast<int32_t>(row.kept_token_ids.size()));
    if (!all) kept_ids.insert(kept_ids.end(), row.kept_token_ids.begin(), row.kept_token_ids.end());
  }
}

void LogprobColumns::AppendRange(const LogprobColumns& from, int64_t begin, int64_t end, const LogprobLayout& layout) {
  if (layout.raw) {
    AppendRows(from.raw, begin, end, 1, raw);
    AppendRows(from.top_raw_ids, begin, end, layout.top_k, top_raw_ids);
    AppendRows(from.top_raw, begin, end, layout.top_k, top_raw);
  }
  if (layout.temperature) {
    AppendRows(from.temperature, begin, end, 1, temperature);
    AppendRows(from.top_temperature_ids, begin, end, layout.top_k, top_temperature_ids);
    AppendRows(from.top_temperature, begin, end, layout.top_k, top_temperature);
  }
  if (layout.processed) {
    AppendRows(from.processed, begin, end, 1, processed);
    AppendRows(from.top_processed_ids, begin, end, layout.top_k, top_processed_ids);
    AppendRows(from.top_processed, begin, end, layout.top_k, top_processed);
  }
  if (layout.kept) {
    const int64_t kept_begin = from.KeptIn(0, begin);
    AppendRows(from.kept_ids, kept_begin, kept_begin + from.KeptIn(begin, end), 1, kept_ids);
    AppendRows(from.kept_counts, begin, end, 1, kept_counts);
  }
}

int64_t LogprobColumns::KeptIn(int64_t begin, int64_t end) const {
  if (kept_counts.empty()) return 0;
  return std::accumulate(kept_counts.begin() + begin, kept_counts.begin() + end, int64_t{0});
}

}  // namespace lockstep

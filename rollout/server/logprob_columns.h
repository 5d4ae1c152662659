// Log-probabilities of consecutive tokens as columns: what a request's buffer holds and a message is filled from. A row
// per token would cost seven vectors each.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler/sampler.h"

namespace lockstep {

// Which columns a request has, and how wide.
struct LogprobLayout {
  bool raw = false;
  bool temperature = false;
  bool processed = false;
  int32_t top_k = 0;  // entries per token and kind: min(requested, vocab_size)
  bool kept = false;
  int64_t vocab_size = 0;

  int kinds() const { return int{raw} + int{temperature} + int{processed}; }
  bool empty() const { return kinds() == 0 && !kept; }
};

class LogprobColumns {
 public:
  void Append(const RowLogprobs& row, const LogprobLayout& layout);
  // Appends rows [begin, end) of `from`, which has the same layout.
  void AppendRange(const LogprobColumns& from, int64_t begin, int64_t end, const LogprobLayout& layout);
  // Sum of kept_counts over rows [begin, end).
  int64_t KeptIn(int64_t begin, int64_t end) const;

  std::vector<float> raw, temperature, processed;  // [rows]
  // [rows * top_k]; rows with fewer entries are filled up with id -1, logprob -inf.
  std::vector<int32_t> top_raw_ids, top_temperature_ids, top_processed_ids;
  std::vector<float> top_raw, top_temperature, top_processed;
  std::vector<int32_t> kept_counts;  // [rows]; 0: nothing was filtered
  std::vector<int32_t> kept_ids;     // [sum of kept_counts]
};

}  // namespace lockstep

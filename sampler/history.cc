#include <algorithm>

#include "sampler/sampler.h"

namespace lockstep {

TokenHistory::TokenHistory(std::span<const int32_t> prompt, bool needs_counts)
    : tokens_(prompt.begin(), prompt.end()),
      prompt_length_(static_cast<int64_t>(prompt.size())),
      needs_counts_(needs_counts) {
  if (!needs_counts_) return;
  std::vector<int32_t> distinct = tokens_;
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (const int32_t token : distinct) {
    index_.emplace_back(token, static_cast<int32_t>(counts_.size()));
    counts_.push_back({.token = token, .generated = 0, .in_prompt = true});
  }
}

void TokenHistory::Append(int32_t token) {
  tokens_.push_back(token);
  if (!needs_counts_) return;
  auto at = std::lower_bound(index_.begin(), index_.end(), std::pair<int32_t, int32_t>(token, 0));
  if (at == index_.end() || at->first != token) {
    at = index_.emplace(at, token, static_cast<int32_t>(counts_.size()));
    counts_.push_back({.token = token, .generated = 0, .in_prompt = false});
  }
  ++counts_[at->second].generated;
}

}  // namespace lockstep

#include "rollout/worker/stop.h"

#include <algorithm>
#include <span>
#include <string>
#include <utility>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

// One pattern over bytes or tokens, by Knuth, Morris and Pratt: amortised constant time per element, overlapping
// matches included.
template <class T>
class KmpPattern {
 public:
  explicit KmpPattern(std::span<const T> pattern)
      : pattern_(pattern.begin(), pattern.end()), border_(pattern_.size(), 0) {
    LOCKSTEP_CHECK(!pattern_.empty(), "an empty stop string or stop token sequence");
    for (int32_t i = 1, matched = 0; i < size(); ++i) {
      while (matched > 0 && pattern_[i] != pattern_[matched]) matched = border_[matched - 1];
      if (pattern_[i] == pattern_[matched]) ++matched;
      border_[i] = matched;
    }
  }

  int32_t size() const { return static_cast<int32_t>(pattern_.size()); }

  // Advances `state`, in [0, size()]; true if the pattern ends with this element.
  bool Advance(T element, int32_t& state) const {
    if (state == size()) state = border_.back();
    while (state > 0 && element != pattern_[state]) state = border_[state - 1];
    if (element == pattern_[state]) ++state;
    return state == size();
  }

 private:
  std::vector<T> pattern_;
  std::vector<int32_t> border_;  // of each prefix: its longest proper border
};

// Advances all patterns by one element; the index of the longest that ends with it (the first of equals), or -1.
template <class T>
int32_t AdvanceAll(const std::vector<KmpPattern<T>>& patterns, T element, std::vector<int32_t>& states) {
  int32_t longest = -1;
  for (size_t i = 0; i < patterns.size(); ++i) {
    if (!patterns[i].Advance(element, states[i])) continue;
    if (longest < 0 || patterns[i].size() > patterns[longest].size()) longest = static_cast<int32_t>(i);
  }
  return longest;
}

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

struct StopMatcher::Patterns {
  int64_t min_tokens = 0;
  TokenBytesFn bytes;
  std::vector<int32_t> eos_token_ids;
  std::vector<int32_t> stop_token_ids;
  std::vector<KmpPattern<int32_t>> sequences;
  std::vector<KmpPattern<char>> strings;
};

StopMatcher::StopMatcher(const StopSpec& spec, int64_t min_tokens, const TokenBytes* bytes)
    : StopMatcher(spec, min_tokens,
                  bytes == nullptr ? TokenBytesFn() : TokenBytesFn([bytes](int32_t id) { return bytes->bytes(id); })) {}

StopMatcher::StopMatcher(const StopSpec& spec, int64_t min_tokens, TokenBytesFn bytes) {
  LOCKSTEP_CHECK(spec.stop_strings.empty() || bytes, "stop strings need the bytes of tokens");
  auto patterns = std::make_shared<Patterns>();
  patterns->min_tokens = min_tokens;
  patterns->bytes = std::move(bytes);
  patterns->eos_token_ids = spec.eos_token_ids;
  patterns->stop_token_ids = spec.stop_token_ids;
  for (const std::vector<int32_t>& sequence : spec.stop_token_sequences) patterns->sequences.emplace_back(sequence);
  for (const std::string& text : spec.stop_strings) patterns->strings.emplace_back(text);
  sequence_state_.assign(patterns->sequences.size(), 0);
  string_state_.assign(patterns->strings.size(), 0);
  patterns_ = std::move(patterns);
}

std::optional<StopMatch> StopMatcher::MatchString(std::string_view bytes) {
  std::optional<StopMatch> first;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int32_t index = AdvanceAll(patterns_->strings, bytes[i], string_state_);
    if (index < 0 || first.has_value()) continue;
    first = StopMatch{.kind = StopKind::kString,
                      .token_id = -1,
                      .index = index,
                      .last_token_text_offset = static_cast<int64_t>(i) + 1};
  }
  return first;
}

std::optional<StopMatch> StopMatcher::MatchSequence(int32_t token) {
  const int32_t index = AdvanceAll(patterns_->sequences, token, sequence_state_);
  if (index < 0) return std::nullopt;
  return StopMatch{.kind = StopKind::kTokenSequence, .token_id = -1, .index = index, .last_token_text_offset = 0};
}

std::optional<StopMatch> StopMatcher::Append(int32_t token) {
  ++generated_;
  const std::string_view bytes = patterns_->strings.empty() ? std::string_view() : patterns_->bytes(token);
  const std::optional<StopMatch> string = MatchString(bytes);
  const std::optional<StopMatch> sequence = MatchSequence(token);
  if (generated_ < patterns_->min_tokens) return std::nullopt;

  if (string.has_value() && string->last_token_text_offset < static_cast<int64_t>(bytes.size())) return string;
  if (Contains(patterns_->eos_token_ids, token)) {
    return StopMatch{.kind = StopKind::kEos, .token_id = token, .index = -1, .last_token_text_offset = 0};
  }
  if (Contains(patterns_->stop_token_ids, token)) {
    return StopMatch{.kind = StopKind::kTokenId, .token_id = token, .index = -1, .last_token_text_offset = 0};
  }
  return sequence.has_value() ? sequence : string;
}

}  // namespace lockstep

#include "rollout/server/token_buffer.h"

#include <algorithm>

#include "rollout/base/check.h"

namespace lockstep {
namespace {

// Protobuf's varint of a non-negative id below vocab_size.
int64_t IdWireBytes(int64_t vocab_size) {
  int64_t bytes = 1;
  for (int64_t largest = vocab_size - 1; largest >= 128; largest >>= 7) ++bytes;
  return bytes;
}

int64_t RowMemoryBytes(const LogprobLayout& layout) {
  return 4 + layout.kinds() * (4 + 8 * int64_t{layout.top_k}) + (layout.kept ? 4 : 0);
}

}  // namespace

int64_t MaxWireBytes(const LogprobLayout& layout, int64_t kept) {
  const int64_t id = IdWireBytes(layout.vocab_size);
  constexpr int64_t kTopId = 10;  // a missing entry is id -1, which protobuf encodes in 10 bytes
  const int64_t count = layout.kept ? 5 : 0;
  return id + layout.kinds() * (4 + (kTopId + 4) * int64_t{layout.top_k}) + count + kept * id;
}

void TokenBuffer::Append(std::span<const int32_t> tokens, std::span<const RowLogprobs> rows) {
  const int64_t n = static_cast<int64_t>(std::max(tokens.size(), rows.size()));
  LOCKSTEP_CHECK(layout_.empty() || static_cast<int64_t>(rows.size()) == n, "{} tokens with {} rows of logprobs",
                 tokens.size(), rows.size());
  for (int64_t i = 0; i < n; ++i) {
    if (chunks_.empty() || chunks_.back().rows == kChunkRows) {
      chunks_.push_back(Chunk{.offset = end_, .rows = 0, .tokens = {}, .logprobs = {}});
    }
    Chunk& chunk = chunks_.back();
    if (!tokens.empty()) chunk.tokens.push_back(tokens[i]);
    if (!layout_.empty()) chunk.logprobs.Append(rows[i], layout_);
    ++chunk.rows;
    ++end_;
  }
}

TokenSlice TokenBuffer::Copy(int64_t offset, int64_t max_wire_bytes) const {
  LOCKSTEP_CHECK(offset >= begin_ && offset <= end_, "offset {} outside [{}, {}]", offset, begin_, end_);
  TokenSlice slice;
  slice.offset = offset;
  int64_t wire = 0;
  for (const Chunk& chunk : chunks_) {
    const int64_t from = std::max<int64_t>(offset - chunk.offset, 0);
    if (from >= chunk.rows) continue;
    int64_t to = from;
    for (; to < chunk.rows; ++to) {
      wire += MaxWireBytes(layout_, layout_.kept ? chunk.logprobs.kept_counts[to] : 0);
      if (wire > max_wire_bytes && slice.rows + (to - from) > 0) break;
    }
    if (!chunk.tokens.empty()) {
      slice.tokens.insert(slice.tokens.end(), chunk.tokens.begin() + from, chunk.tokens.begin() + to);
    }
    slice.logprobs.AppendRange(chunk.logprobs, from, to, layout_);
    slice.rows += to - from;
    if (to < chunk.rows) break;
  }
  return slice;
}

int64_t TokenBuffer::Bytes(int64_t begin, int64_t end) const {
  LOCKSTEP_CHECK(begin >= begin_ && begin <= end && end <= end_, "rows [{}, {}) of [{}, {})", begin, end, begin_, end_);
  int64_t bytes = (end - begin) * RowMemoryBytes(layout_);
  if (!layout_.kept) return bytes;
  for (const Chunk& chunk : chunks_) {
    const int64_t from = std::clamp<int64_t>(begin - chunk.offset, 0, chunk.rows);
    const int64_t to = std::clamp<int64_t>(end - chunk.offset, 0, chunk.rows);
    if (from < to) bytes += 4 * chunk.logprobs.KeptIn(from, to);
  }
  return bytes;
}

void TokenBuffer::TrimBefore(int64_t offset) {
  while (!chunks_.empty() && chunks_.front().offset + chunks_.front().rows <= offset) chunks_.pop_front();
  begin_ = chunks_.empty() ? end_ : chunks_.front().offset;
}

void TokenBuffer::Clear() {
  chunks_.clear();
  begin_ = end_;
}

}  // namespace lockstep

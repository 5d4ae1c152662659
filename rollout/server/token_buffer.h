// A growing run of tokens (or prompt positions) with their log-probabilities, kept in chunks so that what was read can
// be given back. Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "rollout/server/logprob_columns.h"

namespace lockstep {

// Part of a buffer, copied out for one message.
struct TokenSlice {
  int64_t offset = 0;
  std::vector<int32_t> tokens;  // empty for prompt positions
  LogprobColumns logprobs;
  int64_t rows = 0;

  int64_t end() const { return offset + rows; }
};

class TokenBuffer {
 public:
  TokenBuffer(int64_t offset, const LogprobLayout& layout) : layout_(layout), begin_(offset), end_(offset) {}

  // `tokens` is empty for prompt positions; `rows` holds one entry per token (ignored where the layout is empty).
  void Append(std::span<const int32_t> tokens, std::span<const RowLogprobs> rows);

  int64_t begin() const { return begin_; }  // first offset still held
  int64_t end() const { return end_; }      // one past the last
  const LogprobLayout& layout() const { return layout_; }

  // Copies rows from `offset` on: as many as stay within `max_wire_bytes` when encoded, at least one if there is one.
  TokenSlice Copy(int64_t offset, int64_t max_wire_bytes) const;
  // Memory held for rows [begin, end), by content. begin() <= begin <= end <= end().
  int64_t Bytes(int64_t begin, int64_t end) const;
  // Drops whole chunks before `offset`.
  void TrimBefore(int64_t offset);
  void Clear();

 private:
  struct Chunk {
    int64_t offset = 0;
    int64_t rows = 0;
    std::vector<int32_t> tokens;
    LogprobColumns logprobs;
  };
  static constexpr int64_t kChunkRows = 256;

  LogprobLayout layout_;
  std::deque<Chunk> chunks_;
  int64_t begin_;
  int64_t end_;
};

// Upper bound of the encoded size of one row with `kept` kept ids.
int64_t MaxWireBytes(const LogprobLayout& layout, int64_t kept);

}  // namespace lockstep

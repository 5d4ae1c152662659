// From one row of logits to one token and its log-probabilities. A pure function of its arguments: the draw is keyed by
// (seed, prompt hash, sample index, generated position) and depends on nothing else, so a request gives the same tokens
// in any batch, on any worker.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "sampler/params.h"

namespace lockstep {

// What the filters need to know of the sequence so far. Counts are kept incrementally by the caller through Append.
class TokenHistory {
 public:
  // `prompt`: the tokens before the first generated one. `needs_counts`: whether any penalty is on (otherwise no table
  // is kept).
  TokenHistory(std::span<const int32_t> prompt, bool needs_counts);
  void Append(int32_t token);

  int64_t prompt_length() const { return prompt_length_; }
  int64_t generated() const { return static_cast<int64_t>(tokens_.size()) - prompt_length_; }
  std::span<const int32_t> tokens() const { return tokens_; }  // prompt, then generated
  struct Count {
    int32_t token;
    int32_t generated;  // times generated
    bool in_prompt;
  };
  std::span<const Count> counts() const { return counts_; }  // each token seen, once; empty unless needs_counts

 private:
  std::vector<int32_t> tokens_;
  int64_t prompt_length_ = 0;
  bool needs_counts_ = false;
  std::vector<Count> counts_;
  std::vector<std::pair<int32_t, int32_t>> index_;  // sorted (token, index into counts_)
};

struct DrawKey {
  uint64_t seed = 0;
  uint64_t prompt_hash = 0;  // PromptHash of the prompt's tokens (without a generated prefix)
  uint32_t sample_index = 0;
  uint32_t position = 0;  // generated tokens before this one (a generated prefix counts)
};

// A 64-bit hash of token ids; the same on every machine.
uint64_t PromptHash(std::span<const int32_t> tokens);

// Uniform in (0, 1): Philox4x32-10 of the key. An odd multiple of 2^-53 made of 52 random bits, so never 0 or 1.
double UniformDraw(const DrawKey& key);

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

// Log-probabilities of one position. Fields not asked for stay 0 or empty.
struct RowLogprobs {
  float raw = 0;
  float temperature = 0;
  float processed = 0;
  // The k most probable under each distribution, descending, ties by lowest id; fewer where fewer have a probability
  // above 0.
  std::vector<TokenLogprob> top_raw, top_temperature, top_processed;
  std::vector<int32_t> kept_token_ids;  // ascending
};

struct SampledToken {
  int32_t token = 0;
  RowLogprobs logprobs;
};

// Buffers that one thread reuses between calls; contents mean nothing to callers.
struct SamplerScratch {
  std::vector<float> scaled;         // logits / T
  std::vector<float> processed;      // adjusted, divided by T, filtered
  std::vector<float> weights;        // e^(logit - max) of the row looked at last
  std::vector<uint64_t> block_mass;  // their sums (row_ops.h)
  std::vector<uint64_t> keys;        // tokens in rank order (token_key.h)
};

// Draws a token. `logits`: [vocab], fp32; -inf is a probability of 0. `params` are valid (ValidateSamplingParams).
// INTERNAL for a NaN or +inf, naming the token; FAILED_PRECONDITION where no token is left: every logit is -inf, or
// every token is masked (allowed_token_ids against bad_words, say).
absl::StatusOr<SampledToken> SampleRow(std::span<const float> logits, const SamplingParams& params,
                                       const LogprobOptions& options, const TokenHistory& history, const DrawKey& key,
                                       SamplerScratch& scratch);

// The log-probabilities of a given token (teacher forcing): raw and temperature kinds, and their top-k. `processed` and
// `kept_token_ids` need a draw's filters and history; they are computed too when asked for, by the same code as
// SampleRow. A token that the filters drop has `processed` -inf.
absl::StatusOr<RowLogprobs> ScoreRow(std::span<const float> logits, int32_t token, const SamplingParams& params,
                                     const LogprobOptions& options, const TokenHistory& history,
                                     SamplerScratch& scratch);

}  // namespace lockstep

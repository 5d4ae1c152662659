// Vector passes over one row of logits. Same bits on every instruction set.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "sampler/token_key.h"

namespace lockstep {

// Tokens per entry of `block_mass`.
inline constexpr int64_t kMassBlock = 1024;
inline constexpr int64_t MassBlocks(int64_t vocab) {
  return (vocab + kMassBlock - 1) / kMassBlock;
}

struct RowRange {
  float max = 0;       // -inf if every logit is; undefined if not valid
  bool valid = false;  // no NaN and no +inf
};
RowRange FindRange(std::span<const float> row);

// out[i] = row[i] / divisor. out: [row.size()]; may be row.
void DivideRow(std::span<const float> row, float divisor, float* out);

// weights[i] = e^(row[i] - max) within 1 ulp, 0 where row[i] - max < -87; block_mass[b] = sum of Mass(weights[i]) over
// block b. Returns the total. max: the row's maximum, finite. weights: [row.size()]; block_mass:
// [MassBlocks(row.size())].
uint64_t WeighRow(std::span<const float> row, float max, float* weights, uint64_t* block_mass);

// The lowest index whose logit equals `value`; row.size() if none.
int64_t FindFirst(std::span<const float> row, float value);

// Appends the keys of tokens from `begin` on with logit > above, in ascending order of id, until `keys` holds
// `capacity` of them. Returns where it stopped: the next token to look at, or row.size().
int64_t AppendKeys(std::span<const float> row, int64_t begin, float above, size_t capacity,
                   std::vector<TokenKey>& keys);

// Bins of a row's tokens by max - logit, 1/8 each; beyond 32 a token has no mass. The bin never decreases in rank order
// (every rounding in it is monotone) and equal logits share one, so all of a bin ranks before the next.
inline constexpr int kBins = 256;
// bin_mass[b] = sum of Mass(weights[i]) over bin b.
void BinMasses(std::span<const float> row, float max, const float* weights, std::array<uint64_t, kBins>& bin_mass);
// Appends the keys of bin b.
void AppendBin(std::span<const float> row, float max, int bin, std::vector<TokenKey>& keys);

// Sets to -inf every logit below `logit`.
void DropBelow(std::span<float> row, float logit);

}  // namespace lockstep

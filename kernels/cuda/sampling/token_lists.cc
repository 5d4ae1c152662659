#include "kernels/cuda/sampling/token_lists.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "rollout/base/check.h"

namespace lockstep::cuda {
namespace {

constexpr auto kBiasBytes = static_cast<int64_t>(sizeof(TokenBias));

void CheckToken(int32_t token, int64_t vocab) {
  LOCKSTEP_CHECK(token >= 0 && token < vocab, "token {} in a vocabulary of {}", token, vocab);
}

int64_t BiasOffset(const SamplingParams& params, int64_t vocab) {
  return params.allowed_token_ids.empty() ? 0 : KeptBytes(vocab);
}

}  // namespace

bool HasTokenLists(const SamplingParams& params) {
  return !params.allowed_token_ids.empty() || !params.logit_bias.empty();
}

int64_t MaxTokenListBytes(int64_t vocab) {
  const int64_t bytes = KeptBytes(vocab) + std::min(vocab, kMaxLogitBiasEntries) * kBiasBytes;
  return (bytes + 255) / 256 * 256;
}

int64_t TokenListBytes(const SamplingParams& params, int64_t vocab) {
  return BiasOffset(params, vocab) + static_cast<int64_t>(params.logit_bias.size()) * kBiasBytes;
}

void PackTokenLists(const SamplingParams& params, int64_t vocab, std::span<std::byte> to) {
  const int64_t bias_offset = BiasOffset(params, vocab);
  LOCKSTEP_CHECK(static_cast<int64_t>(to.size()) == TokenListBytes(params, vocab), "{} bytes for lists of {}",
                 to.size(), TokenListBytes(params, vocab));
  std::memset(to.data(), 0, bias_offset);
  for (const int32_t token : params.allowed_token_ids) {
    CheckToken(token, vocab);
    to[token / 8] |= std::byte{1} << token % 8;
  }
  std::byte* next = to.data() + bias_offset;
  for (const auto& [token, bias] : params.logit_bias) {
    CheckToken(token, vocab);
    const TokenBias entry = {.token = token, .bias = bias};
    std::memcpy(next, &entry, sizeof(entry));
    next += sizeof(entry);
  }
}

void PointToTokenLists(const SamplingParams& params, int64_t vocab, const std::byte* lists, DeviceTask& task) {
  if (!params.allowed_token_ids.empty()) task.allowed = reinterpret_cast<const uint32_t*>(lists);
  task.biases = reinterpret_cast<const TokenBias*>(lists + BiasOffset(params, vocab));
  task.bias_count = static_cast<int32_t>(params.logit_bias.size());
}

}  // namespace lockstep::cuda

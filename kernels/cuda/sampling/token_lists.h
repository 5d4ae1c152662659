// A request's allowed_token_ids and logit_bias as the kernels read them: a bit a token, then biases by ascending token.
// They are the same at every step, so they are packed and sent once and stay on the device (device_token_lists.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cuda/sampling/device_task.h"
#include "sampler/params.h"

namespace lockstep::cuda {

bool HasTokenLists(const SamplingParams& params);

// The longest that a valid request's can be: about 144 KB for a vocabulary of 100,000. A multiple of 256.
int64_t MaxTokenListBytes(int64_t vocab);
// Those of `params`; a multiple of 8.
int64_t TokenListBytes(const SamplingParams& params, int64_t vocab);
// to: [TokenListBytes(params, vocab)], 8-byte aligned.
void PackTokenLists(const SamplingParams& params, int64_t vocab, std::span<std::byte> to);
// `lists`: where the kernels find them, packed.
void PointToTokenLists(const SamplingParams& params, int64_t vocab, const std::byte* lists, DeviceTask& task);

}  // namespace lockstep::cuda

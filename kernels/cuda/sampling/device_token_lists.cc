#include "kernels/cuda/sampling/device_token_lists.h"

#include <algorithm>
#include <bit>

#include "kernels/cuda/sampling/token_lists.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kSmallestStaging = int64_t{1} << 16;

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceTokenLists>> DeviceTokenLists::Create(int64_t vocab, int64_t requests) {
  LOCKSTEP_ASSIGN_OR_RETURN(auto memory, CudaMemory::Allocate(requests * MaxTokenListBytes(vocab)));
  return std::unique_ptr<DeviceTokenLists>(new DeviceTokenLists(vocab, requests, std::move(memory)));
}

void DeviceTokenLists::Place(const RowTask& task, DeviceTask& device) {
  const SamplingParams& params = *task.params;
  if (!HasTokenLists(params)) return;
  const ListPlaces::Found found = places_.Find(task.request);
  std::byte* const lists = memory_->data() + found.place * MaxTokenListBytes(vocab_);
  if (found.fresh) {
    fresh_.push_back({.params = &params, .to = lists});
    params_[found.place] = &params;
  }
  LOCKSTEP_CHECK(params_[found.place] == &params, "request {} has two sets of parameters", task.request);
  PointToTokenLists(params, vocab_, lists, device);
}

absl::Status DeviceTokenLists::Send(PinnedMemory& staging, cudaStream_t stream) {
  int64_t total = 0;
  for (const Fresh& fresh : fresh_) total += TokenListBytes(*fresh.params, vocab_);
  if (staging.bytes() < total) {
    const auto size = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(total, kSmallestStaging))));
    LOCKSTEP_ASSIGN_OR_RETURN(staging, PinnedMemory::Allocate(size));
  }
  std::byte* from = staging.data();
  for (const Fresh& fresh : fresh_) {
    const int64_t bytes = TokenListBytes(*fresh.params, vocab_);
    PackTokenLists(*fresh.params, vocab_, {from, static_cast<size_t>(bytes)});
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(fresh.to, from, bytes, cudaMemcpyHostToDevice, stream),
                                        "cudaMemcpyAsync of token lists"));
    from += bytes;
  }
  fresh_.clear();
  return absl::OkStatus();
}

}  // namespace lockstep::cuda

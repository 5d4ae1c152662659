// A copy, in host memory, of the weights that serve, as they are held: what brings them back when an update that writes
// in their place fails.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/base/memory.h"

namespace lockstep {

// Used by one thread at a time, but for done() and total().
class WeightShadow {
 public:
  struct Tensor {
    std::string name;
    int64_t offset = 0;  // of `live`
    int64_t bytes = 0;
  };
  // Copies nothing yet. `live` must outlive it. RESOURCE_EXHAUSTED: no host memory for it.
  static absl::StatusOr<WeightShadow> Create(LiveWeights* live, std::vector<Tensor> tensors);
  WeightShadow(WeightShadow&& other) noexcept;

  int64_t bytes() const { return arena_.bytes(); }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  // Of what was copied last.
  uint64_t digest(size_t tensor) const { return digests_[tensor]; }
  const std::byte* data(size_t tensor) const { return arena_.data() + tensors_[tensor].offset; }

  // Copies these tensors from the weights that serve. CANCELLED: as asked.
  absl::Status Write(std::span<const size_t> tensors, const std::atomic<bool>& cancelled);
  // Puts them back as they were copied, and compares the digests of what is in use then. No step may run. CANCELLED: as
  // asked.
  absl::Status Restore(std::span<const size_t> tensors, const std::atomic<bool>& cancelled);

  // Bytes of the Write or Restore that goes on, or went on last.
  int64_t done() const { return done_; }
  int64_t total() const { return total_; }

 private:
  WeightShadow(LiveWeights* live, std::vector<Tensor> tensors, Arena arena)
      : live_(*live), tensors_(std::move(tensors)), arena_(std::move(arena)), digests_(tensors_.size()) {}
  void Begin(std::span<const size_t> tensors, int64_t passes);

  LiveWeights& live_;
  std::vector<Tensor> tensors_;
  Arena arena_;
  std::vector<uint64_t> digests_;  // of what was copied, by tensor
  std::atomic<int64_t> done_ = 0, total_ = 0;
};

}  // namespace lockstep

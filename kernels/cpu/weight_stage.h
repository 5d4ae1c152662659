// New weights beside those in use, in host memory.
#pragma once

#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/base/memory.h"

namespace lockstep {

class CpuWeightStage final : public WeightStage {
 public:
  explicit CpuWeightStage(Arena arena) : arena_(std::move(arena)) {}
  int64_t bytes() const override { return arena_.bytes(); }
  absl::Status Write(int64_t offset, std::span<const std::byte> data) override {
    std::memcpy(arena_.data() + offset, data.data(), data.size());
    return absl::OkStatus();
  }
  absl::Status Finish() override { return absl::OkStatus(); }
  std::byte* Address(int64_t offset, int64_t) override { return arena_.data() + offset; }

 private:
  Arena arena_;
};

class CpuWeightInbox final : public WeightInbox {
 public:
  static absl::StatusOr<std::unique_ptr<CpuWeightInbox>> Create(int64_t buffer_bytes, int64_t tallies);

  int64_t buffer_bytes() const override { return buffer_bytes_; }
  std::byte* buffer(int which) override { return buffers_.data() + which * buffer_bytes_; }
  void* stream() override { return nullptr; }
  absl::Status UseOnThisThread() override { return absl::OkStatus(); }
  absl::Status Reset() override;
  absl::Status Acquire(int) override { return absl::OkStatus(); }
  absl::Status Arrived() override { return absl::OkStatus(); }
  absl::Status Store(const InboxValues& values, WeightStage& stage) override;
  absl::Status Release(int) override { return absl::OkStatus(); }
  absl::StatusOr<bool> Idle() override { return true; }
  absl::StatusOr<std::vector<ValueTally>> Tallies() override { return tallies_; }

 private:
  CpuWeightInbox(Arena buffers, int64_t buffer_bytes, int64_t tallies)
      : buffers_(std::move(buffers)), buffer_bytes_(buffer_bytes), tallies_(tallies) {}
  Arena buffers_;
  int64_t buffer_bytes_;
  std::vector<ValueTally> tallies_;
};

}  // namespace lockstep

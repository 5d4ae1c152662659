// The weights in use, by a tensor's values in order, whatever layout they are packed in: LiveWeights of kernels/ops.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/linear_weight.h"
#include "kernels/ops.h"

namespace lockstep {

// A tensor in use: rows of a packed weight, or values side by side.
struct CpuWeightPlace {
  int64_t offset = 0;
  int64_t bytes = 0;
  CpuLinearWeight* linear = nullptr;  // null: `memory` has the values
  int64_t first_row = 0;
  DType dtype = DType::kF32;  // in which Write takes and Read gives a linear weight's values
  std::byte* memory = nullptr;
};

class CpuLiveWeights final : public LiveWeights {
 public:
  // `places` in ascending order of offset. Write and SumInUse use the context's threads, Read none: steps may run
  // beside it.
  CpuLiveWeights(const CpuContext& context, std::vector<CpuWeightPlace> places)
      : context_(context), places_(std::move(places)) {}

  int64_t bytes() const override { return places_.empty() ? 0 : places_.back().offset + places_.back().bytes; }
  absl::Status Write(int64_t offset, std::span<const std::byte> data) override;
  absl::Status Finish() override { return absl::OkStatus(); }
  std::byte* Address(int64_t, int64_t) override { return nullptr; }
  absl::Status Read(int64_t offset, std::span<std::byte> to) override;
  absl::StatusOr<uint64_t> SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) override;

 private:
  // That which has the bytes; CHECKs that there is one.
  const CpuWeightPlace& Find(int64_t offset, int64_t bytes) const;

  const CpuContext context_;
  const std::vector<CpuWeightPlace> places_;
};

}  // namespace lockstep

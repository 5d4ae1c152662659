// A linear layer's weight, packed for the CPU: panels of 32 output features, each panel contiguous over ascending k, so
// that the inner loop over k is one forward stream. The layout does not depend on the instruction set.
//
//   bf16: panel [K][16] words; word j of step k holds feature j in its high half and feature j + 16 in its low half,
//   which an `and` and a shift turn
//         into two fp32 vectors at any vector width.
//   fp32: panel [K][32] floats, features in order.
//
// The last panel is padded with zero features; their products are never stored.
#pragma once

#include <cstdint>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/ops.h"

namespace lockstep {

constexpr int64_t kPanelFeatures = 32;

class CpuLinearWeight final : public LinearWeight {
 public:
  CpuLinearWeight(int64_t out_features, int64_t in_features, DType dtype)
      : out_features_(out_features),
        in_features_(in_features),
        dtype_(dtype),
        data_(panels() * in_features * kPanelFeatures * DTypeBytes(dtype)) {}

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t bytes() const override { return data_.bytes(); }

  DType dtype() const { return dtype_; }
  int64_t panels() const { return (out_features_ + kPanelFeatures - 1) / kPanelFeatures; }
  std::byte* panel(int64_t p) const { return data_.data() + p * in_features_ * kPanelFeatures * DTypeBytes(dtype_); }

 private:
  const int64_t out_features_;
  const int64_t in_features_;
  const DType dtype_;  // kBF16 or kF32
  const AlignedBuffer data_;
};

}  // namespace lockstep

// A linear layer's weight, packed for the CPU: panels of 32 output features, each panel contiguous over ascending k, so
// that the inner loop over k is one forward stream. The layout does not depend on the instruction set.
//
//   kF32: panel [K][32] floats, features in order.
//   kBf16Halves: panel [K][16] words; word j of step k holds feature j in its high half and feature j + 16 in its low
//     half, which an `and` and a shift turn into two fp32 vectors at any vector width.
//   kBf16Pairs: panel [ceil(K / 2)][32] words; word j of step p holds feature j at k = 2p in its low half and at
//     k = 2p + 1 in its high half, as the bf16 dot product instruction wants it. An odd K ends with a zero.
//
// The last panel is padded with zero features; their products are never stored.
#pragma once

#include <cstdint>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/ops.h"

namespace lockstep {

constexpr int64_t kPanelFeatures = 32;

enum class PanelLayout : uint8_t { kF32, kBf16Halves, kBf16Pairs };

class CpuLinearWeight final : public LinearWeight {
 public:
  CpuLinearWeight(int64_t out_features, int64_t in_features, PanelLayout layout)
      : out_features_(out_features),
        in_features_(in_features),
        layout_(layout),
        data_(panels() * steps() * step_bytes()) {}

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t bytes() const override { return data_.bytes(); }

  PanelLayout layout() const { return layout_; }
  int64_t panels() const { return (out_features_ + kPanelFeatures - 1) / kPanelFeatures; }
  // Of a panel: values of k, or pairs of them.
  int64_t steps() const { return layout_ == PanelLayout::kBf16Pairs ? (in_features_ + 1) / 2 : in_features_; }
  int64_t step_bytes() const { return kPanelFeatures * (layout_ == PanelLayout::kBf16Halves ? 2 : 4); }
  std::byte* panel(int64_t p) const { return data_.data() + p * steps() * step_bytes(); }

 private:
  const int64_t out_features_;
  const int64_t in_features_;
  const PanelLayout layout_;
  const AlignedBuffer data_;
};

// to[k - begin] = the weight's value for output `feature` and input k, begin <= k < end: exactly what was packed.
void ReadFeature(const CpuLinearWeight& weight, int64_t feature, int64_t begin, int64_t end, float* to);
// The other way; rounded to what the layout holds. Two threads may write features of one panel only one at a time.
void WriteFeature(CpuLinearWeight& weight, int64_t feature, int64_t begin, int64_t end, const float* from);

// The layout that a profile's linear program reads.
PanelLayout PanelLayoutOf(const NumericsProfile& profile);

}  // namespace lockstep

#include "kernels/cpu/linear_weight.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels/cpu/host_matrix.h"
#include "kernels/cpu/linear.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

// Steps of k converted at a time: 32 rows are read side by side, and what they write (4 or 8 KiB) stays in L1.
constexpr int64_t kBlock = 64;

// Row `row` of the parts stacked one above the other.
struct SourceRow {
  const HostMatrix* part = nullptr;
  int64_t row = 0;
};

void PackPanel(const std::array<SourceRow, kPanelFeatures>& sources, int64_t count, CpuLinearWeight& weight,
               int64_t panel) {
  const int64_t k_count = weight.in_features();
  std::array<float, kBlock> values;
  for (int64_t k = 0; k < k_count; k += kBlock) {
    const int64_t n = std::min(kBlock, k_count - k);
    for (int64_t j = 0; j < kPanelFeatures; ++j) {
      if (j < count) {
        ReadRow(*sources[j].part, sources[j].row, k, n, values.data());
      } else {
        values.fill(0.0f);
      }
      if (weight.dtype() == DType::kF32) {
        float* to = reinterpret_cast<float*>(weight.panel(panel)) + k * kPanelFeatures + j;
        for (int64_t i = 0; i < n; ++i) to[i * kPanelFeatures] = values[i];
        continue;
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(weight.panel(panel)) + k * (kPanelFeatures / 2) + j % 16;
      // Features 0..15 come first and set the whole word; 16..31 then add their low half.
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = F32ToBf16(values[i]);
        uint32_t& word = to[i * (kPanelFeatures / 2)];
        word = j < 16 ? bits << 16 : word | bits;
      }
    }
  }
}

}  // namespace

std::unique_ptr<LinearWeight> CpuPackLinear(const CpuContext& ctx, std::span<const HostMatrix> parts) {
  LOCKSTEP_CHECK(!parts.empty(), "PackLinear: no parts");
  std::vector<SourceRow> rows;
  for (const HostMatrix& part : parts) {
    LOCKSTEP_CHECK(part.data != nullptr && part.rows > 0 && part.cols > 0, "PackLinear: empty part [{}, {}]", part.rows,
                   part.cols);
    LOCKSTEP_CHECK(part.cols == parts[0].cols, "PackLinear: parts of {} and {} columns", parts[0].cols, part.cols);
    for (int64_t r = 0; r < part.rows; ++r) rows.push_back({&part, r});
  }
  const int64_t out_features = static_cast<int64_t>(rows.size());
  auto weight = std::make_unique<CpuLinearWeight>(out_features, parts[0].cols, ctx.profile.weights);
  ctx.threads.ParallelFor(weight->panels(), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      std::array<SourceRow, kPanelFeatures> sources = {};
      const int64_t count = std::min(kPanelFeatures, out_features - p * kPanelFeatures);
      std::copy_n(rows.begin() + p * kPanelFeatures, count, sources.begin());
      PackPanel(sources, count, *weight, p);
    }
  });
  return weight;
}

}  // namespace lockstep

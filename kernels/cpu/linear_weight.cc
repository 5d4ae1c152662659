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

// Values of k converted at a time, an even number: 32 rows are read side by side, and what they write (4 or 8 KiB)
// stays in L1.
constexpr int64_t kBlock = 64;

// Row `row` of the parts stacked one above the other.
struct SourceRow {
  const HostMatrix* part = nullptr;
  int64_t row = 0;
};

void PackF32(const float* values, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i * kPanelFeatures] = values[i];
}

void PutHalf(float value, bool high, uint32_t& word) {
  const uint32_t bits = F32ToBf16(value);
  word = high ? (word & 0xFFFFu) | bits << 16 : (word & 0xFFFF0000u) | bits;
}

void PackHalves(const float* values, int64_t count, bool high, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) PutHalf(values[i], high, to[i * (kPanelFeatures / 2)]);
}

void PackPairs(const float* values, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 2) {
    const uint32_t even = F32ToBf16(values[i]);
    const uint32_t odd = i + 1 < count ? F32ToBf16(values[i + 1]) : 0;
    to[i / 2 * kPanelFeatures] = odd << 16 | even;
  }
}

// Features [begin, end) of the panel; those past `count` are padding.
void PackPanel(const std::array<SourceRow, kPanelFeatures>& sources, int64_t begin, int64_t end, int64_t count,
               CpuLinearWeight& weight, int64_t panel) {
  const int64_t k_count = weight.in_features();
  std::byte* to = weight.panel(panel);
  std::array<float, kBlock> values;
  for (int64_t k = 0; k < k_count; k += kBlock) {
    const int64_t n = std::min(kBlock, k_count - k);
    for (int64_t j = begin; j < end; ++j) {
      if (j < count) {
        ReadRow(*sources[j].part, sources[j].row, k, n, values.data());
      } else {
        values.fill(0.0f);
      }
      switch (weight.layout()) {
        case PanelLayout::kF32:
          PackF32(values.data(), n, reinterpret_cast<float*>(to) + k * kPanelFeatures + j);
          break;
        case PanelLayout::kBf16Halves:
          PackHalves(values.data(), n, j < 16, reinterpret_cast<uint32_t*>(to) + k * (kPanelFeatures / 2) + j % 16);
          break;
        case PanelLayout::kBf16Pairs:
          PackPairs(values.data(), n, reinterpret_cast<uint32_t*>(to) + k / 2 * kPanelFeatures + j);
          break;
      }
    }
  }
}

}  // namespace

void WriteFeature(CpuLinearWeight& weight, int64_t feature, int64_t begin, int64_t end, const float* from) {
  std::byte* panel = weight.panel(feature / kPanelFeatures);
  const int64_t j = feature % kPanelFeatures;
  auto* floats = reinterpret_cast<float*>(panel) + j;
  auto* halves = reinterpret_cast<uint32_t*>(panel) + j % 16;
  auto* pairs = reinterpret_cast<uint32_t*>(panel) + j;
  for (int64_t k = begin; k < end; ++k) {
    const float value = from[k - begin];
    switch (weight.layout()) {
      case PanelLayout::kF32:
        floats[k * kPanelFeatures] = value;
        break;
      case PanelLayout::kBf16Halves:
        PutHalf(value, j < 16, halves[k * (kPanelFeatures / 2)]);
        break;
      case PanelLayout::kBf16Pairs:
        PutHalf(value, k % 2 != 0, pairs[k / 2 * kPanelFeatures]);
        break;
    }
  }
}

void ReadFeature(const CpuLinearWeight& weight, int64_t feature, int64_t begin, int64_t end, float* to) {
  const std::byte* panel = weight.panel(feature / kPanelFeatures);
  const int64_t j = feature % kPanelFeatures;
  const auto* floats = reinterpret_cast<const float*>(panel) + j;
  const auto* halves = reinterpret_cast<const uint32_t*>(panel) + j % 16;
  const auto* pairs = reinterpret_cast<const uint32_t*>(panel) + j;
  for (int64_t k = begin; k < end; ++k) {
    float& value = to[k - begin];
    switch (weight.layout()) {
      case PanelLayout::kF32:
        value = floats[k * kPanelFeatures];
        break;
      case PanelLayout::kBf16Halves:
        value = Bf16ToF32(static_cast<uint16_t>(halves[k * (kPanelFeatures / 2)] >> (j < 16 ? 16 : 0)));
        break;
      case PanelLayout::kBf16Pairs:
        value = Bf16ToF32(static_cast<uint16_t>(pairs[k / 2 * kPanelFeatures] >> (k % 2 * 16)));
        break;
    }
  }
}

PanelLayout PanelLayoutOf(const NumericsProfile& profile) {
  if (profile.linear == LinearProgram::kTorchCpuPairs) {
    LOCKSTEP_CHECK(profile.weights == DType::kBF16 && profile.activations == DType::kBF16,
                   "profile {}: its linear program multiplies bfloat16 by bfloat16", profile.name);
    return PanelLayout::kBf16Pairs;
  }
  return profile.weights == DType::kBF16 ? PanelLayout::kBf16Halves : PanelLayout::kF32;
}

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
  auto weight = std::make_unique<CpuLinearWeight>(out_features, parts[0].cols, PanelLayoutOf(ctx.profile));
  ctx.threads.ParallelFor(weight->panels(), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      std::array<SourceRow, kPanelFeatures> sources = {};
      const int64_t count = std::min(kPanelFeatures, out_features - p * kPanelFeatures);
      std::copy_n(rows.begin() + p * kPanelFeatures, count, sources.begin());
      PackPanel(sources, 0, kPanelFeatures, count, *weight, p);
    }
  });
  return weight;
}

void CpuStoreLinear(const CpuContext& ctx, const HostMatrix& from, int64_t first_row, CpuLinearWeight& to) {
  const int64_t last_row = first_row + from.rows;
  LOCKSTEP_CHECK(from.cols == to.in_features() && first_row >= 0 && last_row <= to.out_features(),
                 "StoreLinear: [{}, {}] at row {} of [{}, {}]", from.rows, from.cols, first_row, to.out_features(),
                 to.in_features());
  const int64_t first_panel = first_row / kPanelFeatures;
  const int64_t panels = (last_row - 1) / kPanelFeatures + 1 - first_panel;
  ctx.threads.ParallelFor(panels, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = first_panel + begin; p < first_panel + end; ++p) {
      const int64_t base = p * kPanelFeatures;
      const int64_t low = std::max(first_row - base, int64_t{0}), high = std::min(last_row - base, kPanelFeatures);
      std::array<SourceRow, kPanelFeatures> sources = {};
      for (int64_t j = low; j < high; ++j) sources[j] = {&from, base + j - first_row};
      PackPanel(sources, low, high, high, to, p);
    }
  });
}

}  // namespace lockstep

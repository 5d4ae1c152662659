#include "kernels/oracle/row_ops.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels/float_bits.h"
#include "kernels/oracle/special_functions.h"

namespace lockstep::oracle {
namespace {

// What shuffles down, or across by xor, leave in lane 0: halves added until one is left.
float Tree(std::span<float> lanes) {
  for (size_t distance = lanes.size() / 2; distance >= 1; distance /= 2) {
    for (size_t lane = 0; lane < distance; ++lane) lanes[lane] += lanes[lane + distance];
  }
  return lanes[0];
}

float InverseRms(std::span<const uint16_t> x, float eps) {
  std::vector<float> squares(x.size());
  std::ranges::transform(x, squares.begin(), [](uint16_t v) { return Bf16ToF32(v) * Bf16ToF32(v); });
  return Rsqrt(RowMean(squares) + eps);
}

}  // namespace

uint16_t ToBf16(float value) {
  return std::isnan(value) ? 0x7FFF : F32ToBf16(value);
}

float RowMean(std::span<const float> x) {
  assert(x.size() % 4 == 0);
  // Lane i of a warp adds elements 4i..4i+3 of every 128 into four sums.
  std::array<std::array<float, 4>, 32> sums = {};
  for (size_t i = 0; i < x.size(); ++i) sums[i / 4 % 32][i % 4] += x[i];
  std::array<float, 32> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& s = sums[lane];
    lanes[lane] = ((s[0] + s[1]) + s[2]) + s[3];
  }
  return Tree(lanes) * (1.0f / static_cast<float>(x.size()));
}

void RmsNorm(std::span<const uint16_t> x, std::span<const uint16_t> weight, float eps, uint16_t* y) {
  const float inverse = InverseRms(x, eps);
  for (size_t i = 0; i < x.size(); ++i) y[i] = ToBf16(Bf16ToF32(weight[i]) * (Bf16ToF32(x[i]) * inverse));
}

void GatedRmsNorm(std::span<const uint16_t> x, std::span<const uint16_t> weight, std::span<const uint16_t> gate,
                  float eps, uint16_t* y) {
  const float inverse = InverseRms(x, eps);
  for (size_t i = 0; i < x.size(); ++i) {
    const float normed = RoundBf16(Bf16ToF32(x[i]) * inverse);
    const float weighted = RoundBf16(Bf16ToF32(weight[i]) * normed);
    y[i] = ToBf16(weighted * Silu(Bf16ToF32(gate[i])));
  }
}

void L2Norm(std::span<const uint16_t> x, uint16_t* y) {
  assert(x.size() <= 128);
  // 16 lanes of 8 neighbours, the row padded with zeros.
  std::array<float, 16> lanes;
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    auto at = [&](size_t j) { return 8 * lane + j < x.size() ? Bf16ToF32(x[8 * lane + j]) : 0.0f; };
    float sum = at(1) * at(1);
    for (size_t j : {0, 2, 3, 4, 5, 6, 7}) sum = std::fma(at(j), at(j), sum);
    lanes[lane] = sum;
  }
  const float inverse = DivFull(1.0f, SqrtApprox(Tree(lanes) + 1e-6f));
  for (size_t i = 0; i < x.size(); ++i) y[i] = ToBf16(Bf16ToF32(x[i]) * inverse);
}

uint16_t ConvTaps(const uint16_t* x, const uint16_t* weight) {
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) sum += Bf16ToF32(x[i]) * Bf16ToF32(weight[i]);
  return ToBf16(sum);
}

float Sigmoid(float x) {
  return 1.0f / (1.0f + Exp(-x));
}

float Silu(float x) {
  return x / (1.0f + Exp(-x));
}

float Softplus(float x) {
  return x > 20.0f ? x : Log1p(Exp(x));
}

uint16_t SigmoidBf16(uint16_t x) {
  return ToBf16(Sigmoid(Bf16ToF32(x)));
}

uint16_t SiluBf16(uint16_t x) {
  return ToBf16(Silu(Bf16ToF32(x)));
}

uint16_t SwiGlu(uint16_t gate, uint16_t up) {
  return ToBf16(Bf16ToF32(SiluBf16(gate)) * Bf16ToF32(up));
}

float GdnDecay(float a_log, uint16_t a, float dt_bias) {
  return -Exp(a_log) * Softplus(Bf16ToF32(a) + dt_bias);
}

uint16_t GdnBeta(uint16_t b) {
  return ToBf16(2.0f * Bf16ToF32(SigmoidBf16(b)));
}

LogSoftmax LogSoftmaxRow(std::span<const float> logits, int misaligned) {
  constexpr size_t kThreads = 1024;
  const float maximum = *std::ranges::max_element(logits);
  std::array<float, kThreads> sums = {};
  auto add = [&](size_t thread, size_t i) { sums[thread] += Exp(logits[i] - maximum); };

  // Up to the first whole block of threads after the 16-byte boundary before the row, then four neighbours a thread,
  // then the rest one by one.
  size_t begin = 0;
  if (misaligned > 0) {
    begin = std::min(logits.size(), kThreads - misaligned);
    for (size_t i = 0; i < begin; ++i) add(i + misaligned, i);
  }
  const size_t vectors_end = logits.size() - (logits.size() - begin) % (4 * kThreads);
  for (size_t i = begin; i < vectors_end; ++i) add((i - begin) / 4 % kThreads, i);
  for (size_t i = vectors_end; i < logits.size(); ++i) add((i - vectors_end) % kThreads, i);

  std::array<float, 32> warps;
  for (size_t warp = 0; warp < warps.size(); ++warp) warps[warp] = Tree(std::span(sums).subspan(32 * warp, 32));
  return {maximum, Log(Tree(warps))};
}

}  // namespace lockstep::oracle

#include "kernels/oracle/attention.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/float_bits.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::oracle {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

// The four threads that share a row add the numerators of columns 2q, 2q+1 of every 8.
using QuadSums = std::array<float, 4>;

void AddToQuad(const std::vector<float>& numerators, QuadSums& sums) {
  for (size_t j = 0; j < numerators.size(); ++j) sums[j % 8 / 2] += numerators[j];
}

}  // namespace

void AttentionRow(const AttentionHead& head, AttentionOrder order, const uint16_t* q, int position, int window,
                  uint16_t* out, Function exp2) {
  const int dim = head.head_dim;
  assert(dim % kBf16Group == 0 && order.tile_keys % kBf16Group == 0);
  const int first_key = window > 0 ? std::max(0, position - window + 1) : 0;
  const int first_tile = first_key / order.tile_keys;
  const int tile_count = position / order.tile_keys - first_tile + 1;
  const float log2_scale = static_cast<float>(static_cast<double>(head.scale) * 1.4426950408889634074);
  const FactorMatrix query = FactorMatrix::Of(1, dim, [&](int, int x) { return Bf16ToF32(q[x]); });

  std::vector<float> sums(dim, 0.0f);
  QuadSums quad = {};
  float maximum = kMasked;
  for (int step = 0; step < tile_count; ++step) {
    const int tile = order.backward ? first_tile + tile_count - 1 - step : first_tile + step;
    const int first = tile * order.tile_keys;
    auto visible = [&](int j) { return first + j >= first_key && first + j <= position; };
    auto element = [&](const uint16_t* rows, int j, int x) {
      return visible(j) ? Bf16ToF32(rows[(first + j) * head.key_stride + x]) : 0.0f;
    };

    const FactorMatrix keys =
        FactorMatrix::Of(order.tile_keys, dim, [&](int j, int x) { return element(head.k, j, x); });
    std::vector<float> scores(order.tile_keys, 0.0f);
    ChainRow(query.Row(0), keys, scores);
    const float before = maximum;
    for (int j = 0; j < order.tile_keys; ++j) {
      if (visible(j)) maximum = std::max(maximum, scores[j]);
    }

    std::vector<float> numerators(order.tile_keys, 0.0f);
    for (int j = 0; j < order.tile_keys; ++j) {
      if (visible(j)) numerators[j] = exp2(scores[j] * log2_scale - maximum * log2_scale);
    }
    float shrink = 0.0f;
    if (before != kMasked) {
      shrink = exp2(order.shrink_scaled ? before * log2_scale - maximum * log2_scale : (before - maximum) * log2_scale);
    }
    for (float& sum : sums) sum *= shrink;
    if (order.sum_by_tile) {
      QuadSums tile_sums = {};
      AddToQuad(numerators, tile_sums);
      for (int i = 0; i < 4; ++i) quad[i] = std::fma(quad[i], shrink, tile_sums[i]);
    } else {
      for (float& sum : quad) sum *= shrink;
      AddToQuad(numerators, quad);
    }
    const FactorMatrix p = FactorMatrix::Of(1, order.tile_keys, [&](int, int j) { return RoundBf16(numerators[j]); });
    const FactorMatrix values =
        FactorMatrix::Of(dim, order.tile_keys, [&](int x, int j) { return element(head.v, j, x); });
    ChainRow(p.Row(0), values, sums);
  }
  const float total =
      order.join_near_first ? (quad[0] + quad[1]) + (quad[2] + quad[3]) : (quad[0] + quad[2]) + (quad[1] + quad[3]);
  const float inverse = order.approx_inverse ? ReciprocalApprox(total) : 1.0f / total;
  for (int x = 0; x < dim; ++x) out[x] = F32ToBf16(sums[x] * inverse);
}

}  // namespace lockstep::oracle

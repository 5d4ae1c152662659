// One row of causal attention with a GPU's bits: the online softmax of PyTorch's two backends, which differ in the
// order of their key tiles and in the roundings between tiles. One head at a time, so grouped heads are the caller's
// business.
#pragma once

#include <cstdint>

#include "kernels/oracle/special_functions.h"

namespace lockstep::oracle {

// In what order a row is computed, and with which roundings.
struct AttentionOrder {
  int tile_keys;  // tiles are counted from key 0
  bool backward;  // from the tile of the row itself to the first one
  // What is left of the sums when the maximum rises from m to n: exp2(m c - n c), not exp2((m - n) c).
  bool shrink_scaled;
  bool sum_by_tile;      // a tile's numerators are summed apart, then joined by one fma
  bool join_near_first;  // the four sums of a row: neighbours first, not halves
  bool approx_inverse;   // the last factor is rcp.approx.ftz(l), not the IEEE quotient
};
constexpr AttentionOrder kCudnnOrder = {.tile_keys = 128,
                                        .backward = false,
                                        .shrink_scaled = true,
                                        .sum_by_tile = true,
                                        .join_near_first = true,
                                        .approx_inverse = true};
constexpr AttentionOrder kFlash2Order = {.tile_keys = 64,
                                         .backward = true,
                                         .shrink_scaled = false,
                                         .sum_by_tile = false,
                                         .join_near_first = false,
                                         .approx_inverse = false};

struct AttentionHead {
  int head_dim;       // a multiple of 16
  const uint16_t* k;  // bf16; key j at k + j * key_stride
  const uint16_t* v;  // bf16; value j at v + j * key_stride
  int64_t key_stride;
  float scale;  // of q . k, head_dim^-0.5 in fp32
};

// out: [head_dim] bf16, of the row at `position` with query q [head_dim] bf16. window: keys that the row sees, itself
// included; 0 is all of them. Keys it does not see are not read.
void AttentionRow(const AttentionHead& head, AttentionOrder order, const uint16_t* q, int position, int window,
                  uint16_t* out, Function exp2 = Exp2Approx);

}  // namespace lockstep::oracle

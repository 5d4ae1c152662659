// A row's online softmax, in PyTorch's order of arithmetic; shared by the attention kernels so that all give the same
// bits. Every function rounds each operation on its own (the two products of an exponent are not fused).
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/attention_ptx.cuh"

namespace lockstep::cuda {

// kCudnn: tiles of kKeys keys from key 0 on, the roundings between tiles as cuDNN has them; else from the diagonal
// back, as FlashAttention-2 has them. kFolded: the score's scale and log2(e) are one factor, rounded before; else two
// products.
template <bool kCudnn_, int kKeys_, bool kFolded_>
struct TileOrder {
  static constexpr bool kCudnn = kCudnn_;
  static constexpr bool kForward = kCudnn_;
  static constexpr int kKeys = kKeys_;
  static constexpr bool kFolded = kFolded_;
};
using CudnnOrder = TileOrder<true, 128, true>;
using CudnnMaskOrder = TileOrder<true, 128, false>;
using Fa2Order = TileOrder<false, 64, true>;

// The factors by which one tile changes a row.
struct TileFactors {
  float rescale;  // of the row's sum and output so far
  float offset;   // the maximum's exponent
};

// The power of two that a score stands for.
template <class Order>
__device__ inline float Exponent(float score, const ExponentScale& scale) {
  if constexpr (Order::kFolded) return __fmul_rn(score, scale.folded);
  return __fmul_rn(__fmul_rn(score, scale.scale), scale.log2e);
}

// Raises the row's maximum. `tile_max`: over all the tile's visible scores, -infinity for none: such a tile leaves the
// row as it is.
template <class Order>
__device__ inline TileFactors NextTile(float& row_max, float tile_max, const ExponentScale& scale) {
  const float next = fmaxf(row_max, tile_max);
  const float base = next == -INFINITY ? 0.0f : next;
  TileFactors factors;
  factors.offset = Exponent<Order>(base, scale);
  if constexpr (Order::kCudnn) {
    factors.rescale = Exp2(__fsub_rn(Exponent<Order>(row_max, scale), factors.offset));
  } else {
    factors.rescale = Exp2(__fmul_rn(__fsub_rn(row_max, base), scale.folded));
  }
  row_max = next;
  return factors;
}

template <class Order>
__device__ inline float Weight(float score, const TileFactors& factors, const ExponentScale& scale) {
  return Exp2(__fsub_rn(Exponent<Order>(score, scale), factors.offset));
}

// A row's sum of weights, as one thread of its quad holds it: over the columns 2t and 2t + 1 of every 8, ascending.
// FlashAttention-2 goes on with the sum so far, whose rescaling and the tile's first weight are one fma (the compiler's
// contraction); cuDNN sums each tile from 0 and joins it by one fma.
template <class Order>
class RowSum {
 public:
  RowSum() = default;
  // Goes on from another's partial() after a whole number of tiles.
  __device__ explicit RowSum(float partial) : sum_(partial) {}
  __device__ void BeginTile(float rescale) {
    before_ = sum_;
    rescale_ = rescale;
    first_ = true;
  }
  __device__ void Add(float weight) {
    if (!first_) {
      sum_ = __fadd_rn(sum_, weight);
    } else if constexpr (Order::kCudnn) {
      sum_ = weight;
    } else {
      sum_ = __fmaf_rn(before_, rescale_, weight);
    }
    first_ = false;
  }
  __device__ void EndTile() {
    if constexpr (Order::kCudnn) sum_ = __fmaf_rn(before_, rescale_, sum_);
  }
  __device__ float partial() const { return sum_; }
  // 1 / the whole row's sum, in all threads of the quad. cuDNN takes the approximate reciprocal.
  __device__ float Inverse() const {
    constexpr int kNear = Order::kCudnn ? 1 : 2;
    float sum = __fadd_rn(sum_, __shfl_xor_sync(0xFFFFFFFFu, sum_, kNear));
    sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 3 - kNear));
    if constexpr (!Order::kCudnn) return __fdiv_rn(1.0f, sum);
    return Reciprocal(sum);
  }

 private:
  float sum_ = 0.0f;
  float before_ = 0.0f;
  float rescale_ = 0.0f;
  bool first_ = true;  // a constant in every unrolled Add()
};

__device__ inline float QuadMax(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
}

}  // namespace lockstep::cuda

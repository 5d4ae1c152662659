// The gated output norm of one head's row, by 48 of GDN decode's threads, a quad of neighbouring columns each; the row
// comes through shared memory. What does not need the row is loaded and computed ahead of it. Three kinds: no norm,
// PyTorch's (kThree with a bf16 weight, kTwo with a float one), fla's (kOne).
#pragma once

#include <cstdint>

#include "kernels/cuda/gated_norm.cuh"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_state.h"

namespace lockstep::cuda::gdn {

inline constexpr int kNormQuads = kGdnValueDim / kQuad;

// A thread's columns. Two warps take part in the sum; threads past the last quad have the last one again, to read only.
struct NormPlace {
  int thread;
  int lane;

  __device__ bool exists() const { return thread < kNormQuads; }
  __device__ int column() const { return min(thread, kNormQuads - 1) * kQuad; }
};

struct NoNorm {};

template <class Weight>
class TorchNorm {
 public:
  // gate: the head's.
  __device__ void Load(const GdnOutputNorm& norm, const __nv_bfloat16* gate, const NormPlace& place) {
    gate_ = cuda::Load<kQuad>(gate + place.column());
    weight_ = cuda::Load<kQuad>(static_cast<const Weight*>(norm.weight) + place.column());
  }

  __device__ void Prepare() {
    silu_[0] = Unpack(gate_);
    ApplySilu<1>(silu_);
  }

  // x: the head's row, complete and visible.
  __device__ Bf16s<kQuad> Finish(const GdnOutputNorm& norm, const __nv_bfloat16* x, const NormPlace& place) const {
    constexpr int kOwn = kNormQuads / kHalf;
    Floats<kQuad> row[kOwn];
#pragma unroll
    for (int q = 0; q < kOwn; ++q) row[q] = Unpack(cuda::Load<kQuad>(x + (q * kHalf + place.lane % kHalf) * kQuad));
    const float inverse = InverseRms<kGdnValueDim>(SumOfSquares<kOwn>(row), norm.eps);
    return GatedNorm<Weight>(Unpack(cuda::Load<kQuad>(x + place.column())), inverse, Unpack(weight_), silu_[0]);
  }

 private:
  Bf16s<kQuad> gate_;
  VectorOf<Weight, kQuad> weight_;
  Floats<kQuad> silu_[1];
};

class FusedNorm {
 public:
  __device__ void Load(const GdnOutputNorm& norm, const __nv_bfloat16* gate, const NormPlace& place) {
    gate_ = cuda::Load<kQuad>(gate + place.column());
    weight_ = cuda::Load<kQuad>(static_cast<const __nv_bfloat16*>(norm.weight) + place.column());
  }

  __device__ void Prepare() { sigmoid_ = TritonSigmoid(Unpack(gate_)); }

  __device__ Bf16s<kQuad> Finish(const GdnOutputNorm& norm, const __nv_bfloat16* x, const NormPlace& place) const {
    constexpr int kVector = 8;
    const int column = place.lane * kVector;
    const Bf16s<kVector> row = column < kGdnValueDim ? cuda::Load<kVector>(x + column) : Bf16s<kVector>{};
    const float inverse = TritonInverseRms(TritonSumOfSquares<kWarp>(Unpack(row)), kGdnValueDim, norm.eps);
    return FusedGatedNorm(Unpack(cuda::Load<kQuad>(x + place.column())), inverse, Unpack(weight_), Unpack(gate_),
                          sigmoid_);
  }

 private:
  Bf16s<kQuad> gate_;
  Bf16s<kQuad> weight_;
  Floats<kQuad> sigmoid_;
};

}  // namespace lockstep::cuda::gdn

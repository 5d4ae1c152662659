#include <cmath>
#include <type_traits>

#include "kernels/cuda/bf16_rows.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/rms_norm.h"

namespace lockstep::cuda {
namespace {

constexpr int kThreads = 128;  // of a row; as many as accumulators in the sum's order, see SumOfSquares
constexpr int kVector = 8;
constexpr int kStep = kThreads * kVector;  // elements that a block loads at once

using Vector = Bf16s<kVector>;  // the alignment of either dtype's accesses

// A thread's part of a row: vector i is elements kStep * i + 8 * thread and the seven after it, if the row has them.
template <class T, int kVectors>
struct Part {
  VectorOf<T, kVector> vectors[kVectors];
};

struct Columns {
  int width;

  __device__ int column(int i) const { return i * kStep + static_cast<int>(threadIdx.x) * kVector; }
  __device__ bool has(int i) const { return column(i) < width; }
};

// row: of T.
template <class T, int kVectors>
__device__ Part<T, kVectors> LoadPart(const void* row, const Columns& columns) {
  Part<T, kVectors> part;
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    part.vectors[i] =
        columns.has(i) ? Load<kVector>(static_cast<const T*>(row) + columns.column(i)) : VectorOf<T, kVector>{};
  return part;
}

template <class T, int kVectors>
__device__ void StorePart(const Part<T, kVectors>& part, T* row, const Columns& columns) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (columns.has(i)) Store(part.vectors[i], row + columns.column(i));
  }
}

// T: of the rows whose squares are summed.
template <class T>
struct Shared {
  alignas(16) T row[kMaxRmsNormWidth];
  float lane_sums[kWarp];
};

// PyTorch's row sum (at 16 rows and more; here for any number) has 32 lanes. Lane i has four accumulators over elements
// 4i..4i+3 of every 128 and adds them from the left; the lanes' sums meet in a tree of distance 16, 8, 4, 2, 1. Here a
// thread has one accumulator. Addition commutes, so with xor all threads end with lane 0's bits.
template <class T, int kVectors>
__device__ float SumOfSquares(const Part<T, kVectors>& part, const Columns& columns, Shared<T>& shared) {
  StorePart(part, shared.row, columns);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors * kVector; ++i) {
    const int column = i * kThreads + thread;
    const float x = column < columns.width ? static_cast<float>(shared.row[column]) : 0.0f;  // + 0 changes no sum
    sum = __fadd_rn(sum, __fmul_rn(x, x));
  }
  const float second = __shfl_down_sync(kAllLanes, sum, 1);
  const float third = __shfl_down_sync(kAllLanes, sum, 2);
  const float fourth = __shfl_down_sync(kAllLanes, sum, 3);
  sum = __fadd_rn(__fadd_rn(__fadd_rn(sum, second), third), fourth);
  if (thread % 4 == 0) shared.lane_sums[thread / 4] = sum;
  __syncthreads();
  sum = shared.lane_sums[thread % kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, distance));
  }
  return sum;
}

// The mean is the sum times the rounded reciprocal of the width.
__device__ float Inverse(float sum, int width, float eps) {
  return rsqrtf(__fadd_rn(__fmul_rn(sum, __fdiv_rn(1.0f, static_cast<float>(width))), eps));
}

template <class T, class Weight, int kVectors>
__device__ Part<__nv_bfloat16, kVectors> Normalise(const Part<T, kVectors>& part, float inverse,
                                                   const Part<Weight, kVectors>& weight) {
  Part<__nv_bfloat16, kVectors> out;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Floats<kVector> y = Unpack(part.vectors[i]);
    const Floats<kVector> w = Unpack(weight.vectors[i]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) y.v[k] = __fmul_rn(w.v[k], __fmul_rn(y.v[k], inverse));
    out.vectors[i] = Pack(y);
  }
  return out;
}

// In the residual's dtype.
template <class Residual, class T, int kVectors>
__device__ Part<Residual, kVectors> Add(const Part<Residual, kVectors>& residual, const Part<T, kVectors>& x) {
  Part<Residual, kVectors> out;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    Floats<kVector> sum = Unpack(residual.vectors[i]);
    const Floats<kVector> addend = Unpack(x.vectors[i]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum.v[k] = __fadd_rn(sum.v[k], addend.v[k]);
    out.vectors[i] = PackAs<Residual>(sum);
  }
  return out;
}

// The dtypes of x, of the residual stream and of the weight.
template <class X_, class Residual_, class Weight_>
struct Types {
  using X = X_;
  using Residual = Residual_;
  using Weight = Weight_;
};
using AllBf16 = Types<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>;
using Fp32Residual = Types<__nv_bfloat16, float, float>;
using Fp32X = Types<float, float, float>;

// What the squares are summed of.
template <RmsNormFusion kFusion, class T>
using Summed = std::conditional_t<kFusion == RmsNormFusion::kAddBefore, typename T::Residual, typename T::X>;

// One row by one block; kVectors is its width in steps of 1024, rounded up. All loads come first, so their latencies
// overlap.
template <RmsNormFusion kFusion, class T, int kVectors>
__device__ void NormRow(const RmsNormParams& p, int64_t row, Shared<Summed<kFusion, T>>& shared) {
  using X = typename T::X;
  using Residual = typename T::Residual;
  using Weight = typename T::Weight;
  const Columns columns = {static_cast<int>(p.width)};
  const int64_t x_row = kFusion == RmsNormFusion::kNone && p.x_rows != nullptr ? p.x_rows[row] : row;
  const auto x = LoadPart<X, kVectors>(static_cast<const X*>(p.x) + x_row * p.x_stride, columns);
  Residual* residual_row = nullptr;
  Part<Residual, kVectors> residual;
  if constexpr (kFusion != RmsNormFusion::kNone) {
    residual_row = static_cast<Residual*>(p.residual) + row * p.residual_stride;
    residual = LoadPart<Residual, kVectors>(residual_row, columns);
  }
  const auto weight = LoadPart<Weight, kVectors>(p.weight, columns);
  Part<Weight, kVectors> out_weight;
  if constexpr (kFusion == RmsNormFusion::kAddAfterNorm) out_weight = LoadPart<Weight, kVectors>(p.out_weight, columns);

  const auto norm = [&](const auto& part, const Part<Weight, kVectors>& factor) {
    return Normalise(part, Inverse(SumOfSquares(part, columns, shared), columns.width, p.eps), factor);
  };
  __nv_bfloat16* out_row = kFusion == RmsNormFusion::kAddAfter ? nullptr : p.out + row * p.out_stride;
  if constexpr (kFusion == RmsNormFusion::kNone) {
    StorePart(norm(x, weight), out_row, columns);
  } else if constexpr (kFusion == RmsNormFusion::kAddBefore) {
    const auto sum = Add(residual, x);
    StorePart(sum, residual_row, columns);
    StorePart(norm(sum, weight), out_row, columns);
  } else {
    const auto sum = Add(residual, norm(x, weight));
    StorePart(sum, residual_row, columns);
    if constexpr (kFusion == RmsNormFusion::kAddAfterNorm) StorePart(norm(sum, out_weight), out_row, columns);
  }
}

// Grid: (rows), 128 threads, a block a row.
// Traffic: x (and residual) read once and out (and residual) written once, 2 bytes an element of bf16; weights come
// from L2.
template <RmsNormFusion kFusion, class T, int kVectors>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(const __grid_constant__ RmsNormParams params) {
  __shared__ Shared<Summed<kFusion, T>> shared;
  FollowPreviousKernel();
  NormRow<kFusion, T, kVectors>(params, blockIdx.x, shared);
}

// Grid: (rows, 2), 128 threads, a block a row of the first or the second.
// Traffic: as above.
template <int kVectors>
__global__ void __launch_bounds__(kThreads)
    RmsNormPairKernel(const __grid_constant__ RmsNormParams first, const __grid_constant__ RmsNormParams second) {
  __shared__ Shared<__nv_bfloat16> shared;
  FollowPreviousKernel();
  NormRow<RmsNormFusion::kNone, AllBf16, kVectors>(blockIdx.y == 0 ? first : second, blockIdx.x, shared);
}

absl::Status CheckRows(const char* field, const char* stride_field, const void* pointer, int64_t stride,
                       int64_t width) {
  absl::Status status = CheckPointer(field, pointer, sizeof(Vector));
  status.Update(CheckStride(stride_field, stride, width, kVector));
  return status;
}

absl::Status CheckNull(const char* field, const void* pointer, const char* wanted) {
  return pointer == nullptr ? absl::OkStatus() : BadField(field, "a pointer", wanted);
}

template <RmsNormFusion kFusion, class T>
absl::Status LaunchTypes(const RmsNormParams& params, cudaStream_t stream) {
  auto kernel = RmsNormKernel<kFusion, T, 4>;
  if (params.width <= kStep) {
    kernel = RmsNormKernel<kFusion, T, 1>;
  } else if (params.width <= 2 * kStep) {
    kernel = RmsNormKernel<kFusion, T, 2>;
  }
  return LaunchOverlapped("RmsNorm", kernel, static_cast<unsigned>(params.rows), kThreads, stream, params);
}

template <RmsNormFusion kFusion>
absl::Status LaunchFusion(const RmsNormParams& params, cudaStream_t stream) {
  if (params.weight_dtype == DType::kBF16) return LaunchTypes<kFusion, AllBf16>(params, stream);
  if constexpr (kFusion == RmsNormFusion::kNone) {
    if (params.x_dtype == DType::kF32) return LaunchTypes<kFusion, Fp32X>(params, stream);
  }
  return LaunchTypes<kFusion, Fp32Residual>(params, stream);
}

// Those that have a kernel.
absl::Status CheckDTypes(const RmsNormParams& p) {
  absl::Status status = CheckBf16OrF32("RmsNormParams.x_dtype", p.x_dtype);
  status.Update(CheckBf16OrF32("RmsNormParams.weight_dtype", p.weight_dtype));
  status.Update(CheckBf16OrF32("RmsNormParams.residual_dtype", p.residual_dtype));
  if (!status.ok()) return status;
  const bool fp32 = p.weight_dtype == DType::kF32;
  if (fp32 && p.fusion == RmsNormFusion::kAddAfterNorm) {
    return BadField("RmsNormParams.weight_dtype", "float32", "bfloat16 with RmsNormFusion::kAddAfterNorm");
  }
  if (p.fusion == RmsNormFusion::kNone) {
    if (!fp32 && p.x_dtype == DType::kF32)
      return BadField("RmsNormParams.x_dtype", "float32", "bfloat16 as the weight");
    return absl::OkStatus();
  }
  if (p.x_dtype != DType::kBF16) return BadField("RmsNormParams.x_dtype", "float32", "bfloat16 beside a residual");
  if (p.residual_dtype != p.weight_dtype) {
    return BadField("RmsNormParams.residual_dtype", std::string(DTypeName(p.residual_dtype)), "the weight's");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RmsNormParams::Validate() const {
  if (rows < 0 || rows > INT32_MAX) return BadField("RmsNormParams.rows", rows, "0 to 2^31 - 1");
  if (width < kMinRmsNormWidth || width > kMaxRmsNormWidth || width % kVector != 0) {
    return BadField("RmsNormParams.width", width, "a multiple of 8 from 128 to 4096");
  }
  if (!(eps >= 0.0f) || std::isinf(eps)) return BadField("RmsNormParams.eps", eps, "a finite value, 0 or more");
  if (absl::Status dtypes = CheckDTypes(*this); !dtypes.ok()) return dtypes;
  absl::Status status = CheckRows("RmsNormParams.x", "RmsNormParams.x_stride", x, x_stride, width);
  status.Update(CheckPointer("RmsNormParams.weight", weight, sizeof(Vector)));
  if (fusion == RmsNormFusion::kAddAfterNorm) {
    status.Update(CheckPointer("RmsNormParams.out_weight", out_weight, sizeof(Vector)));
  } else {
    status.Update(CheckNull("RmsNormParams.out_weight", out_weight, "null without RmsNormFusion::kAddAfterNorm"));
  }
  if (fusion == RmsNormFusion::kNone) {
    status.Update(CheckNull("RmsNormParams.residual", residual, "null with RmsNormFusion::kNone"));
    if (x_rows != nullptr) {
      status.Update(CheckPointer("RmsNormParams.x_rows", x_rows, sizeof(*x_rows)));
      if (out == x) status.Update(BadField("RmsNormParams.out", "x", "other memory with x_rows"));
    }
    if (out == x && x_dtype == DType::kF32) status.Update(BadField("RmsNormParams.out", "x", "other memory than fp32"));
  } else {
    status.Update(
        CheckRows("RmsNormParams.residual", "RmsNormParams.residual_stride", residual, residual_stride, width));
    status.Update(CheckNull("RmsNormParams.x_rows", x_rows, "null without RmsNormFusion::kNone"));
  }
  if (fusion == RmsNormFusion::kAddAfter) {
    status.Update(CheckNull("RmsNormParams.out", out, "null with RmsNormFusion::kAddAfter"));
  } else {
    status.Update(CheckRows("RmsNormParams.out", "RmsNormParams.out_stride", out, out_stride, width));
  }
  return status;
}

absl::Status LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (absl::Status status = params.Validate(); !status.ok()) return status;
  if (params.rows == 0) return absl::OkStatus();
  switch (params.fusion) {
    case RmsNormFusion::kNone:
      return LaunchFusion<RmsNormFusion::kNone>(params, stream);
    case RmsNormFusion::kAddBefore:
      return LaunchFusion<RmsNormFusion::kAddBefore>(params, stream);
    case RmsNormFusion::kAddAfter:
      return LaunchFusion<RmsNormFusion::kAddAfter>(params, stream);
    case RmsNormFusion::kAddAfterNorm:
      return LaunchTypes<RmsNormFusion::kAddAfterNorm, AllBf16>(params, stream);
  }
  return BadField("RmsNormParams.fusion", static_cast<int>(params.fusion), "an RmsNormFusion");
}

absl::Status LaunchRmsNormPair(const RmsNormParams& first, const RmsNormParams& second, cudaStream_t stream) {
  for (const RmsNormParams* params : {&first, &second}) {
    if (absl::Status status = params->Validate(); !status.ok()) return status;
    if (params->fusion != RmsNormFusion::kNone) {
      return BadField("RmsNormParams.fusion", static_cast<int>(params->fusion), "RmsNormFusion::kNone in a pair");
    }
    if (params->weight_dtype != DType::kBF16) {
      return BadField("RmsNormParams.weight_dtype", "float32", "bfloat16 in a pair");
    }
  }
  if (first.rows != second.rows) return BadField("RmsNormParams.rows", second.rows, "as many in both of a pair");
  if (first.rows == 0) return absl::OkStatus();
  const int64_t width = first.width > second.width ? first.width : second.width;
  const auto kernel = width <= kStep ? RmsNormPairKernel<1> : RmsNormPairKernel<4>;
  return LaunchOverlapped("RmsNormPair", kernel, dim3(static_cast<unsigned>(first.rows), 2), kThreads, stream, first,
                          second);
}

}  // namespace lockstep::cuda

// The short convolution of Gated DeltaNet with SiLU and the l2norm of q and k, bit for bit as transformers and
// flash-linear-attention compute them on a GPU; optionally the layer's gates in the same launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/gdn_gates.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

constexpr int64_t kGdnConvWidth = 4;

// Bytes of a sequence's convolution tail: the last 3 rows of `in`, the row of position p at index p % 3.
constexpr int64_t GdnConvTailBytes(int64_t channels) {
  return (kGdnConvWidth - 1) * channels * static_cast<int64_t>(sizeof(__nv_bfloat16));
}

// Channels are [q | k | v], channels = 2 * key_heads * key_dim + value_width; strides in elements. For every row of a
// piece and every channel c:
//   sum = ((w[c][0] x[-3] + w[c][1] x[-2]) + w[c][2] x[-1]) + w[c][3] x[0] in fp32, rounded if conv is kTwo
//   y = round(silu(sum))
//   out = y for v; round(y / sqrt(sum of squares + 1e-6)) per head for q and k
// x[-1] is the sequence's row before, of the batch or of the tail; before position 0 there are zeros and the tail is
// not read. Afterwards the tail holds the piece's last rows.
struct GdnConvParams {
  const __nv_bfloat16* in = nullptr;      // [rows, channels]
  const __nv_bfloat16* weight = nullptr;  // [channels, 4], oldest tap first
  __nv_bfloat16* out = nullptr;           // [rows, channels]; must not overlap `in`
  void* tail = nullptr;                   // of slot s: tail + s * slot_stride; GdnConvTailBytes(channels), see there
  int64_t slot_stride = 0;                // bytes
  int64_t in_stride = 0;
  int64_t out_stride = 0;
  int64_t key_heads = 0;
  int64_t key_dim = 0;  // 32, 64, 96, 128, 192 or 256
  int64_t value_width = 0;
  ConvCasts casts = ConvCasts::kTwo;
  DeviceBatch batch;

  int64_t channels() const { return 2 * key_heads * key_dim + value_width; }
  absl::Status Validate() const;
};

// Asynchronous on `stream`. An empty batch is no work.
absl::Status LaunchGdnConv(const GdnConvParams& params, cudaStream_t stream);
// With LaunchGdnGates(gates, stream) in the same launch.
absl::Status LaunchGdnConvAndGates(const GdnConvParams& params, const GdnGatesParams& gates, cudaStream_t stream);

}  // namespace lockstep::cuda

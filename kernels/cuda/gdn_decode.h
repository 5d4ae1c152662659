// Gated DeltaNet for one new row a sequence: row t of the chunk program, with prefill's bits; optionally with the gated
// output norm in the same launch.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "kernels/cuda/gdn_params.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

// What the gated norm (gated_rms_norm.h) takes beside the rows that it normalises, heads of 192 columns.
struct GdnOutputNorm {
  const __nv_bfloat16* gate = nullptr;  // [rows, value_heads * 192]; must not overlap the output
  const void* weight = nullptr;         // [192], fp32 with kTwo, else bf16
  int64_t gate_stride = 0;              // elements
  float eps = 0;
  GatedNormCasts casts = GatedNormCasts::kThree;

  absl::Status Validate(int32_t value_heads) const;
};

// Computes the rows of pieces [0, decode_pieces) of the batch and moves their slots on by one position. No two of them
// may share a slot. Asynchronous on `stream`; no decode pieces are no work.
absl::Status LaunchGdnDecode(const GdnParams& params, cudaStream_t stream);
// params.out is then what LaunchGatedRmsNorm makes of those rows, in every bit.
absl::Status LaunchGdnDecodeNorm(const GdnParams& params, const GdnOutputNorm& norm, cudaStream_t stream);

}  // namespace lockstep::cuda

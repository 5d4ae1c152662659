// Gated DeltaNet for one new row a sequence: row t of the chunk program, with prefill's bits.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "kernels/cuda/gdn_params.h"

namespace lockstep::cuda {

// Computes the rows of pieces [0, decode_pieces) of the batch and moves their slots on by one position. No two of them
// may share a slot. Asynchronous on `stream`; no decode pieces are no work.
absl::Status LaunchGdnDecode(const GdnParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

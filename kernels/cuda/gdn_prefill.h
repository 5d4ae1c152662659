// Gated DeltaNet over pieces of sequences: the chunk program of flash-linear-attention, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/gdn_params.h"

namespace lockstep::cuda {

// Computes the rows of the prefill pieces, pieces [decode_pieces, piece_count) of the batch, and leaves their slots as
// decoding the same rows one by one would. A piece may start and end anywhere.
struct GdnPrefillParams {
  GdnParams gdn;
  void* workspace = nullptr;    // written and read by this call alone
  int64_t workspace_bytes = 0;  // at least one tile's; with all tiles' the work goes in one pass

  absl::Status Validate() const;
};

// Workspace for a pass over `tiles` tiles: 67 KB a tile and head.
int64_t GdnPrefillWorkspaceBytes(int64_t value_heads, int64_t tiles);

// Asynchronous on `stream`. A batch without tiles is no work.
absl::Status LaunchGdnPrefill(const GdnPrefillParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

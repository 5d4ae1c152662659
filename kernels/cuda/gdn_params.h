// What prefill and decode of a Gated DeltaNet layer both work on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/gdn_state.h"

namespace lockstep::cuda {

// Value head h uses key head h / (value_heads / key_heads). q and k are l2-normalised per head already. Strides in
// elements, from one row of the batch to the next.
struct GdnParams {
  const __nv_bfloat16* q = nullptr;     // [rows, key_heads * 96]
  const __nv_bfloat16* k = nullptr;     // [rows, key_heads * 96]
  const __nv_bfloat16* v = nullptr;     // [rows, value_heads * 192]
  const __nv_bfloat16* beta = nullptr;  // [rows, value_heads]
  const float* g = nullptr;             // [rows, value_heads]: the log of the decay
  __nv_bfloat16* out = nullptr;         // [rows, value_heads * 192]
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  int64_t beta_stride = 0;
  int64_t g_stride = 0;
  int64_t out_stride = 0;
  int32_t key_heads = 0;
  int32_t value_heads = 0;

  char* state = nullptr;    // slot 0's part of this layer
  int64_t slot_stride = 0;  // bytes from one slot to the next
  GdnStateLayout layout;    // MakeGdnStateLayout of the head counts

  DeviceBatch batch;

  // Decode: reads the batch and what the slots hold before the stream's previous kernel has ended, all else after. Not
  // where a kernel that writes them can still be running: since such a kernel there must have been a copy or a wait of
  // the stream.
  bool early_start = false;

  absl::Status Validate() const;
};

}  // namespace lockstep::cuda

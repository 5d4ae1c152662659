// One tensor's values from where a transport has put them into a stage of weights, rounded on the way, with what its
// digests and the look for NaN need: InboxValues (kernels/ops.h) says what is what.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/numerics.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

struct StoreValuesParams {
  const std::byte* from = nullptr;  // device, aligned to 4 values
  DType sent = DType::kF32;
  int64_t count = 0;
  int64_t sent_index = 0;
  int64_t held_index = 0;
  DType held = DType::kF32;
  std::byte* to = nullptr;  // device, 8-byte aligned; null: the values are only counted
  DType stored = DType::kF32;
  ValueTally* tally = nullptr;  // device; null: none

  absl::Status Validate() const;
};
absl::Status LaunchStoreValues(const StoreValuesParams& params, cudaStream_t stream);

}  // namespace lockstep::cuda

// A C ABI over the CUDA operations, for callers in other languages: the bit comparisons with PyTorch (tests/gpu) and a
// learner that runs a worker's own operation. Every function returns 0, or 1 with the reason in lockstep_last_error().
// Pointers are device pointers; `stream` is a cudaStream_t.
#pragma once

#include "absl/status/status.h"

#if defined(__cplusplus)
extern "C" {
#endif

// Of the calling thread's last failed call; valid until its next one.
const char* lockstep_last_error();

#if defined(__cplusplus)
}
#endif

namespace lockstep::cuda {

// What a C function returns for `status`.
int CApiResult(const absl::Status& status);

}  // namespace lockstep::cuda

// What every launcher of this folder checks in the same way, and the device that it counts on. Host code only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/numerics.h"

namespace lockstep::cuda {

constexpr int kMultiprocessors = 132;  // of an H100 or H200

template <class Value>
absl::Status BadField(const char* field, const Value& seen, const char* wanted) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", seen, ", want ", wanted));
}

inline absl::Status CheckBf16OrF32(const char* field, DType seen) {
  if (seen == DType::kBF16 || seen == DType::kF32) return absl::OkStatus();
  return BadField(field, std::string(DTypeName(seen)), "bfloat16 or float32");
}

// `alignment` in bytes: that of the widest load or store through the pointer.
inline absl::Status CheckPointer(const char* field, const void* pointer, uintptr_t alignment) {
  if (pointer == nullptr) return BadField(field, "null", "a device pointer");
  const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) % alignment;
  if (offset == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, ": an address of ", offset, " modulo ", alignment, ", want 0"));
}

// `multiple` in elements: what keeps every row as aligned as the first.
inline absl::Status CheckStride(const char* field, int64_t stride, int64_t width, int64_t multiple) {
  if (stride >= width && stride % multiple == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", stride, ", want at least ", width, " and a multiple of ", multiple));
}

// Status of the launch itself (a bad grid, no kernel for this device); what goes wrong later, a synchronisation tells.
inline absl::Status LaunchStatus(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(kernel, ": ", cudaGetErrorString(error)));
}

}  // namespace lockstep::cuda

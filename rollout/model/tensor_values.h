// Reading the numbers of a tensor as a file holds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/numerics.h"
#include "rollout/base/thread_pool.h"

namespace lockstep {

// A tensor's values: little-endian, contiguous, aligned to the type's size.
struct TensorValues {
  const void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::kF32;
};

struct NonFinite {
  int64_t count = 0;   // NaNs and infinities
  int64_t first = -1;  // the index of the first one
};
NonFinite FindNonFinite(const TensorValues& values, ThreadPool& threads);

// Exact.
std::vector<float> ToFloat(const TensorValues& values);

}  // namespace lockstep

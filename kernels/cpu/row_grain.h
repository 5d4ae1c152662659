// Rows per task of an operation that passes over a row a few times and does little with each element.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lockstep {

// 16 Ki elements are a few microseconds of such work, about what handing a loop to the other threads costs.
inline int64_t RowGrain(int64_t width) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
}

}  // namespace lockstep

#include "rollout/model/tensor_values.h"

#include <atomic>

#include "kernels/host_values.h"

namespace lockstep {

NonFinite FindNonFinite(const TensorValues& values, ThreadPool& threads) {
  const auto* data = static_cast<const std::byte*>(values.data);
  const auto count = [&](int64_t begin, int64_t end) {
    return CountNonFinite(data + begin * DTypeBytes(values.dtype), values.dtype, end - begin);
  };
  std::atomic<int64_t> found{0};
  threads.ParallelFor(values.count, int64_t{1} << 18, [&](int64_t begin, int64_t end, int) {
    const int64_t here = count(begin, end);
    if (here != 0) found.fetch_add(here);
  });
  NonFinite result{.count = found.load()};
  if (result.count == 0) return result;
  result.first = 0;
  while (count(result.first, result.first + 1) == 0) ++result.first;
  return result;
}

std::vector<float> ToFloat(const TensorValues& values) {
  std::vector<float> out(values.count);
  ConvertValues(static_cast<const std::byte*>(values.data), values.dtype, values.count, DType::kF32,
                reinterpret_cast<std::byte*>(out.data()));
  return out;
}

}  // namespace lockstep

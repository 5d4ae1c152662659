#include "rollout/model/tensor_values.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/float_bits.h"

namespace lockstep {
namespace {

// Counts values whose exponent bits are all ones. Plain loops over integers: the compiler vectorises them.
template <typename Word>
int64_t CountNonFinite(const Word* words, int64_t count, Word exponent) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += (words[i] & exponent) == exponent;
  return found;
}

template <typename Word>
NonFinite Find(const void* data, int64_t count, Word exponent, ThreadPool& threads) {
  const auto* words = static_cast<const Word*>(data);
  std::atomic<int64_t> found{0};
  threads.ParallelFor(count, int64_t{1} << 18, [&](int64_t begin, int64_t end, int) {
    const int64_t here = CountNonFinite(words + begin, end - begin, exponent);
    if (here != 0) found.fetch_add(here);
  });
  NonFinite result{.count = found.load()};
  if (result.count != 0) {
    result.first = std::find_if(words, words + count, [&](Word w) { return (w & exponent) == exponent; }) - words;
  }
  return result;
}

}  // namespace

NonFinite FindNonFinite(const TensorValues& values, ThreadPool& threads) {
  switch (values.dtype) {
    case DType::kF32:
      return Find<uint32_t>(values.data, values.count, 0x7F800000u, threads);
    case DType::kBF16:
      return Find<uint16_t>(values.data, values.count, 0x7F80u, threads);
    case DType::kF16:
      return Find<uint16_t>(values.data, values.count, 0x7C00u, threads);
  }
  return {};
}

std::vector<float> ToFloat(const TensorValues& values) {
  std::vector<float> out(values.count);
  const auto* halves = static_cast<const uint16_t*>(values.data);
  switch (values.dtype) {
    case DType::kF32:
      if (values.count > 0) std::memcpy(out.data(), values.data, values.count * sizeof(float));
      break;
    case DType::kBF16:
      std::transform(halves, halves + values.count, out.begin(), Bf16ToF32);
      break;
    case DType::kF16:
      std::transform(halves, halves + values.count, out.begin(), F16ToF32);
      break;
  }
  return out;
}

}  // namespace lockstep

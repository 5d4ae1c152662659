#include "kernels/oracle/linear.h"

#include <algorithm>
#include <vector>

#include "kernels/float_bits.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::oracle {

void LinearSums(LinearShape shape, const uint16_t* x, const uint16_t* weight, float* sums) {
  const FactorMatrix rows = FactorMatrix::Of(
      shape.rows, shape.inputs, [&](int r, int k) { return Bf16ToF32(x[static_cast<int64_t>(r) * shape.inputs + k]); });
  // One row of weights at a time: factors take four times the memory of the weights.
  for (int n = 0; n < shape.outputs; ++n) {
    const uint16_t* w = weight + static_cast<int64_t>(n) * shape.inputs;
    const FactorMatrix factors = FactorMatrix::Of(1, shape.inputs, [&](int, int k) { return Bf16ToF32(w[k]); });
    for (int r = 0; r < shape.rows; ++r) {
      sums[static_cast<int64_t>(r) * shape.outputs + n] = Chain(0.0f, rows.Row(r), factors.Row(0));
    }
  }
}

void Linear(LinearShape shape, const uint16_t* x, const uint16_t* weight, uint16_t* y) {
  std::vector<float> sums(static_cast<size_t>(shape.rows) * shape.outputs);
  LinearSums(shape, x, weight, sums.data());
  std::ranges::transform(sums, y, F32ToBf16);
}

}  // namespace lockstep::oracle

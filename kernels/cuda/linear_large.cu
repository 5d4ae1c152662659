// Tiles of 128 and 256 tokens.
#include "kernels/cuda/linear_kernel.cuh"

namespace lockstep::cuda {

LinearKernel FindLinearKernel2x1(int features) {
  return FindWidth<2, 1>(LinearWidths2x1(), features);
}

LinearKernel FindLinearKernel2x2(int features) {
  return FindWidth<2, 2>(LinearWidths2x2(), features);
}

}  // namespace lockstep::cuda

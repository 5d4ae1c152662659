// Tiles of 64 tokens.
#include "kernels/cuda/linear_kernel.cuh"

namespace lockstep::cuda {

LinearKernel FindLinearKernel1x1(int features) {
  return FindWidth<1, 1>(LinearWidths1x1(), features);
}

}  // namespace lockstep::cuda

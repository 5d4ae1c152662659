// Tiles that end in SwiGLU.
#include "kernels/cuda/linear_kernel.cuh"

namespace lockstep::cuda {

LinearKernel FindLinearSwiGluKernel(const LinearTile& tile) {
  constexpr LinearFusion kSwiGlu = LinearFusion::kSwiGlu;
  if (tile.warpgroups == 1) return FindWidth<1, 1, kSwiGlu>(LinearSwiGluWidths1x1(), tile.features);
  if (tile.blocks == 1) return FindWidth<2, 1, kSwiGlu>(LinearSwiGluWidths2x1(), tile.features);
  return FindWidth<2, 2, kSwiGlu>(LinearSwiGluWidths2x2(), tile.features);
}

}  // namespace lockstep::cuda

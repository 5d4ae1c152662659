#include "kernels/cuda/gdn_state.h"

namespace lockstep::cuda {

GdnStateLayout MakeGdnStateLayout(int64_t key_heads, int64_t value_heads, int64_t conv_width) {
  int64_t end = 0;
  const auto part = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 255) / 256 * 256;
    return begin;
  };
  GdnStateLayout layout;
  layout.conv_tail = part(2 * (conv_width - 1) * GdnConvChannels(key_heads, value_heads));
  layout.state_f32 = part(value_heads * kGdnStateF32Bytes);
  layout.image = part(value_heads * kGdnImageBytes);
  layout.k_rows = part(value_heads * kGdnKeyRowsBytes);
  layout.bv_rows = part(value_heads * kGdnValueRowsBytes);
  layout.vp_rows = part(value_heads * kGdnValueRowsBytes);
  layout.solve = part(value_heads * kGdnSolveBytes);
  layout.scalars = part(value_heads * kGdnScalarBytes);
  layout.bytes = end;
  return layout;
}

}  // namespace lockstep::cuda

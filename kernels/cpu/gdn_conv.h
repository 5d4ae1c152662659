// Causal depthwise convolution over channels [q | k | v] and SiLU; history before the sequence's start is zero. The
// last conv_width - 1 input rows stay in the sequence's state, in the activation dtype.
#pragma once

#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuGdnConv(const CpuContext& ctx, Rows in, const float* weight, const GdnShape& shape,
                std::span<const Piece> pieces, Rows out);

}  // namespace lockstep

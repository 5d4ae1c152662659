// out = x / sqrt(mean(x^2) + eps) * weight * silu(gate), per head of head_dim columns.
#pragma once

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuGatedRmsNorm(const CpuContext& ctx, Rows x, Rows gate, const float* weight, float eps, int64_t head_dim,
                     Rows out);

}  // namespace lockstep

// The gates of Gated DeltaNet: beta = sigmoid(b), doubled where negative eigenvalues are allowed; g = -e^A_log *
// softplus(a + dt_bias), in fp32.
#pragma once

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuGdnGates(const CpuContext& ctx, Rows a, Rows b, const float* a_log, const float* dt_bias, bool neg_eigval,
                 Rows beta, Rows g);

}  // namespace lockstep

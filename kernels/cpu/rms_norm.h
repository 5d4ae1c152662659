// RMSNorm and its fusions with the residual stream, and the plain residual addition: see Ops in kernels/ops.h for the
// formulas.
#pragma once

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuRmsNorm(const CpuContext& ctx, Rows x, const float* weight, float eps, Rows out);
void CpuAddRmsNorm(const CpuContext& ctx, Rows x, Rows residual, const float* weight, float eps, Rows out);
void CpuRmsNormAdd(const CpuContext& ctx, Rows x, const float* weight, float eps, Rows residual);
void CpuAdd(const CpuContext& ctx, Rows x, Rows residual);
void CpuRoundResidual(const CpuContext& ctx, Rows x, Rows out);

}  // namespace lockstep

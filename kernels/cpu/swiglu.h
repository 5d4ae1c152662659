// out = round(round(silu(gate)) * up); gate_up [rows, 2 * width] holds gate, then up; out [rows, width].
#pragma once

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuSwiGlu(const CpuContext& ctx, Rows gate_up, Rows out);

}  // namespace lockstep

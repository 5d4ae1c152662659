// out [M, N] = x [M, K] W^T: every output one fp32 accumulator, from 0, by fused multiply-add over ascending k, then
// one rounding. The same bits for any M, tiling, thread count and instruction set.
#pragma once

#include <memory>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/cpu/linear_weight.h"
#include "kernels/ops.h"

namespace lockstep {

std::unique_ptr<LinearWeight> CpuPackLinear(const CpuContext& ctx, std::span<const HostMatrix> parts);
// Rows [first_row, first_row + from.rows) of a weight that CpuPackLinear made.
void CpuStoreLinear(const CpuContext& ctx, const HostMatrix& from, int64_t first_row, CpuLinearWeight& to);
void CpuLinear(const CpuContext& ctx, Rows x, const LinearWeight& weight, Rows out);  // rounded to profile.activations
void CpuLogits(const CpuContext& ctx, Rows x, const LinearWeight& weight, Rows out);  // rounded to profile.logits

}  // namespace lockstep

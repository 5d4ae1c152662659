// Rotary position embedding, in place: HF's rotate_half pairing, angles in fp32.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuRope(const CpuContext& ctx, Rows x, std::span<const int64_t> positions, std::span<const float> inv_freq,
             float attention_scaling, int64_t head_dim);

}  // namespace lockstep

// Causal attention over paged keys and values, with the tile order of the profile's AttentionProgram.
#pragma once

#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

void CpuAttention(const CpuContext& ctx, Rows q, const AttentionShape& shape, std::span<const Piece> pieces,
                  const KvLayer& kv, Rows out);

}  // namespace lockstep

// The embedding table, row-major in profile.weights, and the row look-up.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

std::unique_ptr<EmbeddingTable> CpuPackEmbedding(const CpuContext& ctx, const HostMatrix& table);
void CpuEmbed(const CpuContext& ctx, std::span<const int32_t> tokens, const EmbeddingTable& table, Rows out);

}  // namespace lockstep

// The embedding table, row-major in profile.embedding or the head's packed weight, and the row look-up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

std::unique_ptr<EmbeddingTable> CpuPackEmbedding(const CpuContext& ctx, const HostMatrix& table);
// Into a table that CpuPackEmbedding made.
void CpuStoreEmbedding(const CpuContext& ctx, const HostMatrix& table, EmbeddingTable& to);
// Its rows side by side, in profile.embedding; of a table that CpuPackEmbedding made.
std::byte* CpuEmbeddingMemory(EmbeddingTable& table);
// Rows of the head's packed weight, which must outlive the table's use.
std::unique_ptr<EmbeddingTable> CpuTieEmbedding(const LinearWeight& head);
void CpuEmbed(const CpuContext& ctx, std::span<const int32_t> tokens, const EmbeddingTable& table, Rows out);

}  // namespace lockstep

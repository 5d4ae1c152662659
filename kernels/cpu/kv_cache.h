// The CPU's KV page. Per kv head, one after another, each at a multiple of 64 bytes:
//
//   keys     [page_size / 16][head_dim][16]: panels of 16 keys, so that 16 scores are one vector, chained over head_dim
//   values   [page_size][head_dim rounded up to 16], the padding zero
//
// in profile.kv: fp32 words or bf16 bits. Positions not yet written hold anything; nothing reads them into a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

struct KvPageLayout {
  KvPageLayout(const NumericsProfile& profile, const AttentionShape& shape, int64_t size);

  int64_t page_size;    // positions
  int64_t value_pitch;  // elements
  int64_t values;       // bytes from a head's begin to its values
  int64_t head_bytes;
  int64_t page_bytes;

  const std::byte* Head(const KvLayer& kv, int32_t page, int64_t head) const {
    return kv.base + page * page_bytes + head * head_bytes;
  }
};

int64_t CpuKvPageBytes(const CpuContext& ctx, const AttentionShape& shape, int64_t page_size);
void CpuWriteKv(const CpuContext& ctx, Rows k, Rows v, const AttentionShape& shape, std::span<const Piece> pieces,
                const KvLayer& kv);

}  // namespace lockstep

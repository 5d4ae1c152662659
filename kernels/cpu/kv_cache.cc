#include "kernels/cpu/kv_cache.h"

#include <algorithm>
#include <vector>

#include "kernels/float_bits.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

uint16_t Convert(float x, uint16_t*) {
  return F32ToBf16(x);
}
float Convert(float x, float*) {
  return x;
}

// One position of one kv head. k, v: [head_dim].
template <class T>
void WritePosition(const float* k, const float* v, int64_t head_dim, int64_t value_pitch, int64_t in_page,
                   std::byte* keys, std::byte* values) {
  T* key = reinterpret_cast<T*>(keys) + in_page / 16 * 16 * head_dim + in_page % 16;
  T* value = reinterpret_cast<T*>(values) + in_page * value_pitch;
  for (int64_t d = 0; d < head_dim; ++d) key[d * 16] = Convert(k[d], static_cast<T*>(nullptr));
  for (int64_t d = 0; d < head_dim; ++d) value[d] = Convert(v[d], static_cast<T*>(nullptr));
  std::fill(value + head_dim, value + value_pitch, T{0});
}

}  // namespace

KvPageLayout::KvPageLayout(const NumericsProfile& profile, const AttentionShape& shape, int64_t size)
    : page_size(size) {
  LOCKSTEP_CHECK(size > 0 && size % 16 == 0, "page_size {}, want a multiple of 16", size);
  LOCKSTEP_CHECK(shape.head_dim > 0 && shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0,
                 "{} heads must be a multiple of {} kv heads; head_dim {}", shape.heads, shape.kv_heads,
                 shape.head_dim);
  const int64_t element = DTypeBytes(profile.kv);
  value_pitch = RoundUp(shape.head_dim, 16);
  values = RoundUp(size * shape.head_dim * element, 64);
  head_bytes = values + RoundUp(size * value_pitch * element, 64);
  page_bytes = shape.kv_heads * head_bytes;
}

int64_t CpuKvPageBytes(const CpuContext& ctx, const AttentionShape& shape, int64_t page_size) {
  return KvPageLayout(ctx.profile, shape, page_size).page_bytes;
}

void CpuWriteKv(const CpuContext& ctx, Rows k, Rows v, const AttentionShape& shape, std::span<const Piece> pieces,
                const KvLayer& kv) {
  const int64_t width = shape.kv_heads * shape.head_dim;
  LOCKSTEP_CHECK(k.width == width && v.width == width, "k has {} columns and v {}, want {}", k.width, v.width, width);
  const KvPageLayout layout(ctx.profile, shape, kv.page_size);
  const bool bf16 = ctx.profile.kv == DType::kBF16;
  // An item is the part of a piece that lies in one panel of 16 positions, of one kv head: no two items share a cache
  // line.
  struct Item {
    const Piece* piece;
    int64_t begin;  // position
    int64_t end;
  };
  std::vector<Item> items;
  for (const Piece& piece : pieces) {
    LOCKSTEP_CHECK(piece.row_begin >= 0 && piece.row_begin + piece.row_count <= std::min(k.rows, v.rows),
                   "piece ends at row {} of {}", piece.row_begin + piece.row_count, k.rows);
    const int64_t end = piece.position + piece.row_count;
    for (int64_t begin = piece.position; begin < end;) {
      const int64_t next = std::min(end, begin / 16 * 16 + 16);
      items.push_back({&piece, begin, next});
      begin = next;
    }
  }
  ctx.threads.ParallelFor(
      static_cast<int64_t>(items.size()) * shape.kv_heads, 4, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i) {
          const Item& item = items[i / shape.kv_heads];
          const int64_t head = i % shape.kv_heads;
          const int32_t page = item.piece->page_table[item.begin / layout.page_size];
          std::byte* keys = kv.base + page * layout.page_bytes + head * layout.head_bytes;
          for (int64_t position = item.begin; position < item.end; ++position) {
            const int64_t row = item.piece->row_begin + position - item.piece->position;
            const auto write = bf16 ? WritePosition<uint16_t> : WritePosition<float>;
            write(k.row(row) + head * shape.head_dim, v.row(row) + head * shape.head_dim, shape.head_dim,
                  layout.value_pitch, position % layout.page_size, keys, keys + layout.values);
          }
        }
      });
}

}  // namespace lockstep

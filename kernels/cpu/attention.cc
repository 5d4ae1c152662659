// One row of one head, over tiles of 64, 128 or 512 keys counted from position 0, in the program's order; keys out of
// sight take no part at all:
//
//   s_j = scale * (chain over d of q_d k_jd);   m' = max(m, max of the tile's s);   c = e^(m - m')
//   p_j = e^(s_j - m');   l = fma(l, c, sum of the tile's p)        sum: lane j % 16 adds ascending j, then a tree
//   o = c o, then the chain over the tile's visible keys, ascending, of round(p_j) v_j
//
// and at the end round(o * (1 / l)). With tiles of 512, the chain starts from zero in every 192 keys of a tile, and o
// takes their sums in order.
//
// Grid: (kv head, piece, block of rows), the kv head outermost so that one head's keys and values stay in cache over a
// piece's blocks. The heads of a group and the rows of a block share every load of K and V. Traffic of a decode row:
// its sequence's K and V once.
#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/kv_cache.h"
#include "rollout/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/row_matrix-inl.h"
#include "kernels/cpu/simd_util-inl.h"

#ifndef LOCKSTEP_KERNELS_CPU_ATTENTION_ONCE_
#define LOCKSTEP_KERNELS_CPU_ATTENTION_ONCE_
namespace lockstep {

constexpr int64_t kMaxTile = 512;

// Keys of a tile whose products with V make one chain. In PyTorch's CPU kernel it is the matrix product of oneMKL that
// cuts them, at 192; there a tile of 193 to 384 keys, the last of a sequence, is cut in halves instead, which makes a
// row depend on how many follow it, and is not done here.
inline int64_t ChainKeys(AttentionProgram program, int64_t tile) {
  return program == AttentionProgram::kTiles512Forward ? 192 : tile;
}

inline int64_t TileKeys(AttentionProgram program) {
  switch (program) {
    case AttentionProgram::kTiles128Forward:
    case AttentionProgram::kTiles128ForwardMask:
      return 128;
    case AttentionProgram::kTiles512Forward:
      return 512;
    case AttentionProgram::kTiles64Backward:
      return 64;
  }
  LOCKSTEP_CHECK(false, "unknown attention program {}", static_cast<int>(program));
  return 0;
}

// A block of consecutive positions of one sequence, for the query heads of one kv head: row r * group + h of the block
// is head h of position r.
struct AttentionBlock {
  const KvPageLayout& layout;
  const AttentionShape& shape;
  const NumericsProfile& profile;
  KvLayer kv;
  const int32_t* page_table;
  int64_t kv_head;
  int64_t position;  // of the block's first row
  Rows q;            // [rows, heads * head_dim]
  Rows out;          // the same shape
  float* scratch;    // AttentionScratch::Floats

  AttentionProgram program() const { return shape.window > 0 ? profile.sliding_attention : profile.attention; }
};

// Row counts are of block rows.
struct AttentionScratch {
  static int64_t RoundUp(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t Floats(int64_t rows, int64_t head_dim, int64_t value_pitch) {
    return RoundUp(rows * head_dim) + rows * kMaxTile + 2 * rows * value_pitch + 2 * RoundUp(rows);
  }
  AttentionScratch(float* base, int64_t rows, int64_t head_dim, int64_t value_pitch)
      : q(base),
        p(q + RoundUp(rows * head_dim)),
        o(p + rows * kMaxTile),
        chain(o + rows * value_pitch),
        max(chain + rows * value_pitch),
        sum(max + RoundUp(rows)) {}

  float* q;      // [rows, head_dim]
  float* p;      // [rows, kMaxTile]: scores, then numerators
  float* o;      // [rows, value_pitch]
  float* chain;  // the same shape: a chain of P V that starts from zero
  float* max;    // [rows]: m
  float* sum;    // [rows]: l
};

}  // namespace lockstep
#endif

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// Keys [begin, end) visible to a row, cut to the tile.
struct Visible {
  int64_t begin;
  int64_t end;
};

Visible VisibleKeys(const AttentionBlock& b, int64_t row, int64_t tile_begin, int64_t tile_end) {
  const int64_t position = b.position + row;
  const int64_t first = b.shape.window > 0 ? std::max<int64_t>(0, position - b.shape.window + 1) : 0;
  return {std::max(first, tile_begin), std::min(position + 1, tile_end)};
}

HWY_INLINE float MaxLane(VF v) {
  HWY_ALIGN float lanes[kLanes];
  hn::Store(v, DF(), lanes);
  return *std::max_element(lanes, lanes + kLanes);
}

// AttentionExp::kTorchCpu, for x <= 0: 2^(x log2 e) by the exponent's bits, with a cubic in the fraction for what a
// straight line misses. Coefficients: PyTorch 2.13, Vectorized<float>::fexp_u20. Its result is a bf16 numerator's to
// within a tenth of a rounding.
VF TorchExp(VF x) {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const VF y = hn::Mul(x, hn::Set(df, 1.44269504f));
  const VF f = hn::Sub(y, hn::Floor(y));
  VF c = hn::MulAdd(f, hn::Set(df, -0.079204240219773236f), hn::Set(df, -0.22433836478672356f));
  c = hn::MulAdd(c, f, hn::Set(df, 0.30354260500649682f));
  c = hn::MulAdd(c, f, hn::Set(df, 0.00010703434948458272f));
  const VF bits = hn::MulAdd(hn::Sub(y, c), hn::Set(df, 8388608.0f), hn::Set(df, 1065353216.0f));
  // Below -87.3 the exponent would underflow; -inf, a key out of sight, is there too.
  const auto tiny = hn::Lt(x, hn::Set(df, -87.33654f));
  const VF safe = hn::IfThenZeroElse(tiny, bits);
  return hn::IfThenZeroElse(tiny, hn::BitCast(df, hn::ConvertTo(di, safe)));
}

// Scores of one row's tile into numerators, and its m, l and o brought to the new maximum. p: [kMaxTile], lanes of keys
// tile_begin + i.
template <bool kRoundP, bool kTorchExp>
void SoftmaxTile(Visible keys, int64_t tile_begin, float scale, float* p, float* o, int64_t value_pitch, float* max,
                 float* sum) {
  const DF df;
  const VF factor = hn::Set(df, scale);
  const VF minus_inf = hn::Set(df, -std::numeric_limits<float>::infinity());
  const int64_t begin = keys.begin - tile_begin;
  const int64_t end = keys.end - tile_begin;
  const VF first = hn::Set(df, static_cast<float>(begin));
  const VF last = hn::Set(df, static_cast<float>(end));
  const int64_t from = begin / 16 * 16;
  VF top = minus_inf;
  for (int64_t i = from; i < end; i += kLanes) {
    const VF index = hn::Iota(df, static_cast<float>(i));
    const auto seen = hn::And(hn::Ge(index, first), hn::Lt(index, last));
    const VF s = hn::IfThenElse(seen, hn::Mul(hn::Load(df, p + i), factor), minus_inf);
    hn::Store(s, df, p + i);
    top = hn::Max(top, s);
  }
  const float new_max = std::max(*max, MaxLane(top));
  const VF m = hn::Set(df, new_max);
  F32x16 total = Zero16();
  for (int64_t i = from; i < end; i += 16) {
    for (size_t part = 0; part < F32x16::kParts; ++part) {
      const int64_t at = i + static_cast<int64_t>(part * kLanes);
      if (at >= end) break;
      // Keys out of sight have s = -inf, so e^(s - m) is exactly 0 and adding it changes nothing.
      const VF x = hn::Sub(hn::Load(df, p + at), m);
      const VF e = kTorchExp ? TorchExp(x) : Exp(x);
      total.part[part] = hn::Add(total.part[part], e);
      hn::Store(RoundIf<kRoundP>(e), df, p + at);
    }
  }
  const VF rescale = Exp(hn::Sub(hn::Set(df, *max), m));
  *sum = hn::GetLane(hn::MulAdd(hn::Set(df, *sum), rescale, hn::Set(df, Sum16(total))));
  *max = new_max;
  for (int64_t c = 0; c < value_pitch; c += kLanes) hn::Store(hn::Mul(hn::Load(df, o + c), rescale), df, o + c);
}

// o[r] += the chain over keys [begin, end) of p[r][key] * v[key], page by page.
template <class T>
void AddValues(const AttentionBlock& b, int64_t rows, int64_t begin, int64_t end, int64_t tile_begin, const float* p,
               float* o) {
  const int64_t vp = b.layout.value_pitch;
  while (begin < end) {
    const int64_t in_page = begin % b.layout.page_size;
    const int64_t count = std::min(end - begin, b.layout.page_size - in_page);
    const std::byte* head = b.layout.Head(b.kv, b.page_table[begin / b.layout.page_size], b.kv_head);
    const T* values = reinterpret_cast<const T*>(head + b.layout.values) + in_page * vp;
    MatMul<Start::kOutput>(rows, vp, count, p + begin - tile_begin, kMaxTile, values, vp, o, vp);
    begin += count;
  }
}

// to[r] += the chain over the keys of `part` that position r sees, ascending: keys only it sees before the shared ones,
// the shared ones for all rows at once, the rest.
template <class T>
void AddChain(const AttentionBlock& b, const AttentionScratch& s, int64_t first, int64_t last, int64_t tile_begin,
              Visible part, float* to) {
  const int64_t group = b.shape.heads / b.shape.kv_heads;
  const int64_t vp = b.layout.value_pitch;
  const int64_t shared_begin = VisibleKeys(b, last - 1, part.begin, part.end).begin;
  const int64_t shared_end = VisibleKeys(b, first, part.begin, part.end).end;
  const bool shared = shared_begin < shared_end;
  const auto add = [&](int64_t r, int64_t positions, int64_t begin, int64_t end) {
    AddValues<T>(b, positions * group, begin, end, tile_begin, s.p + r * group * kMaxTile, to + r * group * vp);
  };
  for (int64_t r = first; r < last; ++r) {
    const Visible keys = VisibleKeys(b, r, part.begin, part.end);
    add(r, 1, keys.begin, shared ? shared_begin : keys.end);
  }
  if (!shared) return;
  add(first, last - first, shared_begin, shared_end);
  for (int64_t r = first; r < last; ++r) add(r, 1, shared_end, VisibleKeys(b, r, part.begin, part.end).end);
}

// One tile for the block's positions [first, last), all of which see some of it.
template <class T, bool kRoundP, bool kTorchExp>
void Tile(const AttentionBlock& b, const AttentionScratch& s, int64_t first, int64_t last, int64_t tile_begin,
          int64_t tile_end) {
  const int64_t group = b.shape.heads / b.shape.kv_heads;
  const int64_t dim = b.shape.head_dim;
  const int64_t vp = b.layout.value_pitch;
  // Positions ascend, and with them both ends of what they see.
  const int64_t keys_begin = VisibleKeys(b, first, tile_begin, tile_end).begin;
  const int64_t keys_end = VisibleKeys(b, last - 1, tile_begin, tile_end).end;
  const T* panels[kMaxTile / 16] = {};
  int64_t count = 0;
  const int64_t from = keys_begin / 16 * 16;
  for (int64_t key = from; key < keys_end; key += 16) {
    const std::byte* head = b.layout.Head(b.kv, b.page_table[key / b.layout.page_size], b.kv_head);
    panels[count++] = reinterpret_cast<const T*>(head) + key % b.layout.page_size * dim;
  }
  const int64_t row = first * group;
  const int64_t rows = (last - first) * group;
  DotPanels(rows, count, dim, s.q + row * dim, dim, panels, s.p + row * kMaxTile + from - tile_begin, kMaxTile);

  for (int64_t r = first; r < last; ++r) {
    const Visible keys = VisibleKeys(b, r, tile_begin, tile_end);
    for (int64_t h = r * group; h < (r + 1) * group; ++h) {
      SoftmaxTile<kRoundP, kTorchExp>(keys, tile_begin, b.shape.scale, s.p + h * kMaxTile, s.o + h * vp, vp, s.max + h,
                                      s.sum + h);
    }
  }
  const int64_t chain_keys = ChainKeys(b.program(), tile_end - tile_begin);
  for (int64_t begin = tile_begin; begin < keys_end; begin += chain_keys) {
    const Visible part = {begin, std::min(begin + chain_keys, tile_end)};
    if (chain_keys == tile_end - tile_begin) {
      AddChain<T>(b, s, first, last, tile_begin, part, s.o);
      continue;
    }
    if (part.end <= keys_begin) continue;
    std::fill_n(s.chain + row * vp, rows * vp, 0.0f);
    AddChain<T>(b, s, first, last, tile_begin, part, s.chain);
    const DF df;
    for (int64_t i = row * vp; i < (row + rows) * vp; i += kLanes)
      hn::Store(hn::Add(hn::Load(df, s.o + i), hn::Load(df, s.chain + i)), df, s.o + i);
  }
}

template <class T, bool kRoundP, bool kTorchExp>
void Block(const AttentionBlock& b) {
  const DF df;
  const int64_t group = b.shape.heads / b.shape.kv_heads;
  const int64_t dim = b.shape.head_dim;
  const int64_t vp = b.layout.value_pitch;
  const int64_t rows = b.q.rows * group;
  const AttentionScratch s(b.scratch, rows, dim, vp);
  for (int64_t r = 0; r < b.q.rows; ++r)
    std::copy_n(b.q.row(r) + b.kv_head * group * dim, group * dim, s.q + r * group * dim);
  std::fill_n(s.o, rows * vp, 0.0f);
  std::fill_n(s.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum, rows, 0.0f);

  const bool forward = b.program() != AttentionProgram::kTiles64Backward;
  const int64_t tile = TileKeys(b.program());
  const int64_t lowest = b.shape.window > 0 ? std::max<int64_t>(0, b.position - b.shape.window + 1) : 0;
  const int64_t first_tile = lowest / tile;
  const int64_t tiles = (b.position + b.q.rows - 1) / tile + 1 - first_tile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = (forward ? first_tile + i : first_tile + tiles - 1 - i) * tile;
    int64_t first = 0;
    int64_t last = b.q.rows;
    const auto sees = [&](int64_t r) {
      const Visible keys = VisibleKeys(b, r, begin, begin + tile);
      return keys.begin < keys.end;
    };
    while (first < last && !sees(first)) ++first;
    while (first < last && !sees(last - 1)) --last;
    if (first < last) Tile<T, kRoundP, kTorchExp>(b, s, first, last, begin, begin + tile);
  }

  const bool bf16 = b.profile.activations == DType::kBF16;
  for (int64_t r = 0; r < rows; ++r) {
    const VF reciprocal = hn::Set(df, 1.0f / s.sum[r]);
    float* o = s.o + r * vp;
    for (int64_t c = 0; c < vp; c += kLanes) {
      const VF y = hn::Mul(hn::Load(df, o + c), reciprocal);
      hn::Store(bf16 ? RoundBf16(y) : y, df, o + c);
    }
    std::copy_n(o, dim, b.out.row(r / group) + (b.kv_head * group + r % group) * dim);
  }
}

template <class T>
void TypedBlock(const AttentionBlock& b) {
  const bool round_p = b.profile.attention_p == DType::kBF16;
  const bool torch_exp = b.profile.attention_exp == AttentionExp::kTorchCpu;
  if (round_p) {
    (torch_exp ? Block<T, true, true> : Block<T, true, false>)(b);
  } else {
    LOCKSTEP_CHECK(!torch_exp, "AttentionExp::kTorchCpu goes with bf16 numerators");
    Block<T, false, false>(b);
  }
}

void AttentionBlockImpl(const AttentionBlock& b) {
  (b.profile.kv == DType::kBF16 ? TypedBlock<uint16_t> : TypedBlock<float>)(b);
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(AttentionBlockImpl);

void CpuAttention(const CpuContext& ctx, Rows q, const AttentionShape& shape, std::span<const Piece> pieces,
                  const KvLayer& kv, Rows out) {
  const int64_t width = shape.heads * shape.head_dim;
  LOCKSTEP_CHECK(q.width == width && out.width == width, "q has {} columns and out {}, want {}", q.width, out.width,
                 width);
  LOCKSTEP_CHECK(q.rows == out.rows, "q has {} rows, out {}", q.rows, out.rows);
  const KvPageLayout layout(ctx.profile, shape, kv.page_size);
  const int64_t group = shape.heads / shape.kv_heads;
  // Enough query rows that a tile's K and V, read from the second-level cache, cost less than the arithmetic on them.
  constexpr int64_t kRowsWanted = 32;
  const int64_t block_rows = std::max<int64_t>(1, kRowsWanted / group);
  struct Item {
    const Piece* piece;
    int64_t row;  // in the piece
    int64_t rows;
  };
  std::vector<Item> items;
  for (const Piece& piece : pieces) {
    LOCKSTEP_CHECK(piece.row_begin >= 0 && piece.row_begin + piece.row_count <= q.rows, "piece ends at row {} of {}",
                   piece.row_begin + piece.row_count, q.rows);
    for (int64_t row = 0; row < piece.row_count; row += block_rows)
      items.push_back({&piece, row, std::min(block_rows, piece.row_count - row)});
  }
  const int64_t per_head = static_cast<int64_t>(items.size());
  const int64_t scratch = AttentionScratch::Floats(block_rows * group, shape.head_dim, layout.value_pitch);
  ctx.threads.ParallelFor(per_head * shape.kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Item& item = items[i % per_head];
      const AttentionBlock block = {.layout = layout,
                                    .shape = shape,
                                    .profile = ctx.profile,
                                    .kv = kv,
                                    .page_table = item.piece->page_table,
                                    .kv_head = i / per_head,
                                    .position = item.piece->position + item.row,
                                    .q = q.slice(item.piece->row_begin + item.row, item.rows),
                                    .out = out.slice(item.piece->row_begin + item.row, item.rows),
                                    .scratch = ctx.scratch.Floats(thread, scratch)};
      HWY_DYNAMIC_DISPATCH(AttentionBlockImpl)(block);
    }
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

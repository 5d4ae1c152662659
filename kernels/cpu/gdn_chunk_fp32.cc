// kChunkFp32: transformers' torch_chunk_gated_delta_rule in PyTorch's own order on a CPU, fp32 between its inputs and
// its output, row by row:
//
//   A_tj = (beta_t k_t . k_j) e^(G_t - G_j);   P_tj = (q_t . k_j) e^(G_t - G_j)
//   u_t  = beta_t v_t - sum_{j<t} A_tj u_j;    w_t = e^G_t (beta_t k_t) - sum_{j<t} A_tj w_j
//   v'_t = u_t - w_t S
//   o_t  = (e^G_t q_t) S + sum_{j<=t} P_tj v'_j
//   S'   = e^G_63 S + sum_j (e^(G_63 - G_j) k_j) v'_j
//
// Products with q, k, S and v' are chains of fused multiply-adds over ascending d_k or j from zero, as oneMKL makes
// them at these depths. The two solves multiply and add apart, as oneMKL's portable kernel does (AMD's processors run
// it; Intel's have others): j in fours goes to 4 sums by j % 4, joined as (0 + 2) + (1 + 3), the last j % 4 follow in
// order, and the whole is subtracted. G is summed in fp64 and each G_t rounded. A decode row reads S, 6 d_k (t + 1)
// bytes of bf16 keys and w and 8 d_v t of u and v' (at 96 x 192: 73.7 KB + 2.1 KB per open row); S is written once in
// 64 rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/gdn_chunk.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gdn_chunk_fp32.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/gdn_rows-inl.h"
#include "kernels/cpu/row_matrix-inl.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// Vectors of a row solved at a time, with four sums each.
constexpr int kSolveVectors = kAccumulators / 4;
// Rows of S updated at a time at a chunk's end.
constexpr int64_t kStateRows = 8;

struct Fp32Scratch {
  float* key;       // [rows, d_k]: k of the block
  float* kq;        // [2 rows, d_k]: beta k of a value head, then q (scaled by d_k^-0.5)
  float* dots;      // [2 rows, 64]: beta_t k_t . k_j, q_t . k_j
  float* a;         // [rows, 64]: A
  float* p;         // [rows, 64]
  float* wq;        // [2 rows, d_k]: w, then e^G q
  float* x;         // [2 rows, d_v]: w S, then q S
  float* pv;        // [rows, d_v]: P v'
  float* panels;    // [4, d_k, 16]: the chunk's keys so far, normalised
  float* key_rows;  // [d_k, 64]: the same, at the chunk's end
  float* scaled;    // the same, times e^(G_63 - G)
  float* update;    // [kStateRows, d_v]
};

Fp32Scratch Carve(const GdnBlock& block) {
  const int64_t kp = block.layout.key_pitch;
  const int64_t vp = block.layout.value_pitch;
  float* next = block.scratch;
  const auto take = [&next](int64_t floats) {
    float* part = next;
    next += floats;
    return part;
  };
  return {.key = take(kGdnBlock * kp),
          .kq = take(2 * kGdnBlock * kp),
          .dots = take(2 * kGdnBlock * kGdnChunk),
          .a = take(kGdnBlock * kGdnChunk),
          .p = take(kGdnBlock * kGdnChunk),
          .wq = take(2 * kGdnBlock * kp),
          .x = take(2 * kGdnBlock * vp),
          .pv = take(kGdnBlock * vp),
          .panels = take(kp * kGdnChunk),
          .key_rows = take(kp * kGdnChunk),
          .scaled = take(kp * kGdnChunk),
          .update = take(kStateRows * vp)};
}

// One value head's part of the slot.
struct ValueHead {
  ValueHead(const GdnBlock& b, int64_t h)
      : head(b.slot + b.layout.value_heads + h * b.layout.value_head_bytes),
        state(reinterpret_cast<float*>(head + b.layout.state)),
        decay(reinterpret_cast<float*>(head + b.layout.decay)),
        decay_sum(reinterpret_cast<double*>(head + b.layout.decay_sum)),
        new_values(reinterpret_cast<float*>(head + b.layout.new_values)),
        solved(reinterpret_cast<float*>(head + b.layout.solved)) {}

  std::byte* head;
  float* state;       // [d_k, d_v]
  float* decay;       // [64]: G
  double* decay_sum;  // of the rows so far
  float* new_values;  // [64, d_v]: v'
  float* solved;      // [64, d_v + d_k]: u, w
};

HWY_INLINE float KeyWord(float x, float) {
  return x;
}
// A bf16 activation is a bf16 value already.
HWY_INLINE uint16_t KeyWord(float x, uint16_t) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
}

// Normalised k and q into scratch, k as it came into the slot. T: the slot's type of keys.
template <class T>
void NormaliseRows(const GdnBlock& b, const Fp32Scratch& s, T* panels, float* factors) {
  const int64_t dk = b.shape.key_dim;
  const DF df;
  const VF scale = hn::Set(df, static_cast<float>(1.0 / std::sqrt(static_cast<double>(dk))));
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t t = b.open + i;
    const float* q = b.qkv.row(i) + b.key_head * dk;
    const float* k = q + b.shape.key_width();
    factors[t] = InverseNorm(b.profile.square_sum, k, dk);
    const VF k_factor = hn::Set(df, factors[t]);
    const VF q_factor = hn::Set(df, InverseNorm(b.profile.square_sum, q, dk));
    MapRow(k, s.key + i * dk, dk, [=](VF x) { return hn::Mul(x, k_factor); });
    MapRow(q, s.kq + (b.rows + i) * dk, dk, [=](VF x) { return hn::Mul(hn::Mul(x, q_factor), scale); });
    T* column = panels + t / 16 * dk * 16 + t % 16;
    for (int64_t d = 0; d < dk; ++d) column[d * 16] = KeyWord(k[d], T());
  }
}

// The chunk's keys so far, normalised: the same products as NormaliseRows'. Lanes of keys to come hold anything.
template <class T>
void ExpandPanels(const GdnBlock& b, const T* panels, const float* factors, float* to) {
  const int64_t dk = b.shape.key_dim;
  for (int64_t p = 0; p < (b.open + b.rows + 15) / 16; ++p) {
    const F32x16 factor = Load16(factors + p * 16);
    for (int64_t d = p * dk; d < (p + 1) * dk; ++d) {
      for (size_t i = 0; i < F32x16::kParts; ++i) {
        const int64_t at = d * 16 + static_cast<int64_t>(i * kLanes);
        hn::Store(hn::Mul(LoadWide(panels + at), factor.part[i]), DF(), to + at);
      }
    }
  }
}

template <class T>
void PrepareKeys(const GdnBlock& b, const Fp32Scratch& s) {
  std::byte* slot = b.slot + b.layout.key_heads + b.key_head * b.layout.key_head_bytes;
  T* panels = reinterpret_cast<T*>(slot);
  float* factors = reinterpret_cast<float*>(slot + b.layout.key_factors);
  NormaliseRows(b, s, panels, factors);
  ExpandPanels(b, panels, factors, s.panels);
}

// beta k of the value head, and it against all keys up to the block's last; for the key head's first value head q too.
void Dots(const GdnBlock& b, const Fp32Scratch& s, int64_t value_head, bool first) {
  const int64_t dk = b.shape.key_dim;
  for (int64_t i = 0; i < b.rows; ++i) {
    const VF beta = hn::Set(DF(), b.beta.row(i)[value_head]);
    MapRow(s.key + i * dk, s.kq + i * dk, dk, [=](VF x) { return hn::Mul(x, beta); });
  }
  const float* panel[4];
  for (int64_t p = 0; p < 4; ++p) panel[p] = s.panels + p * dk * 16;
  DotPanels((first ? 2 : 1) * b.rows, (b.open + b.rows + 15) / 16, dk, s.kq, dk, panel, s.dots, kGdnChunk);
}

// row -= sum_{j<t} a_j * solved[j], in the order above.
template <int kVectors>
HWY_INLINE void SolveColumns(const float* a, int64_t t, const float* solved, int64_t pitch, float* row) {
  const DF df;
  VF sum[4][kVectors];
  HWY_UNROLL(4) for (auto& lane : sum) {
    HWY_UNROLL(8) for (VF& v : lane) v = hn::Zero(df);
  }
  int64_t j = 0;
  for (; j + 4 <= t; j += 4) {
    // A decode row waits for memory.
    if constexpr (kVectors > 1) {
      const float* ahead = solved + (j + 8) * pitch;
      HWY_UNROLL(4) for (int lane = 0; lane < 4; ++lane) {
        HWY_UNROLL(8) for (size_t i = 0; i < kVectors * kLanes; i += 16) hwy::Prefetch(ahead + lane * pitch + i);
      }
    }
    HWY_UNROLL(4) for (int lane = 0; lane < 4; ++lane) {
      const VF factor = hn::Set(df, a[j + lane]);
      HWY_UNROLL(8) for (int v = 0; v < kVectors; ++v) {
        const VF earlier = hn::LoadU(df, solved + (j + lane) * pitch + v * kLanes);
        sum[lane][v] = hn::Add(sum[lane][v], hn::Mul(factor, earlier));
      }
    }
  }
  HWY_UNROLL(8) for (int v = 0; v < kVectors; ++v) {
    VF total = hn::Add(hn::Add(sum[0][v], sum[2][v]), hn::Add(sum[1][v], sum[3][v]));
    for (int64_t rest = j; rest < t; ++rest) {
      const VF earlier = hn::LoadU(df, solved + rest * pitch + v * kLanes);
      total = hn::Add(total, hn::Mul(hn::Set(df, a[rest]), earlier));
    }
    hn::StoreU(hn::Sub(hn::LoadU(df, row + v * kLanes), total), df, row + v * kLanes);
  }
}

// Row t of u and w, which holds the right-hand sides. kVectors columns' worth at a time, then fewer.
template <int kVectors>
void SolveRow(const float* a, int64_t t, float* solved, int64_t pitch, int64_t column) {
  constexpr int64_t kWidth = kVectors * static_cast<int64_t>(kLanes);
  float* row = solved + t * pitch;
  for (; column + kWidth <= pitch; column += kWidth) SolveColumns<kVectors>(a, t, solved + column, pitch, row + column);
  if constexpr (kVectors > 1) {
    if (column < pitch) SolveRow<kVectors / 2>(a, t, solved, pitch, column);
  }
}

// The block's rows of A and P, of u and w, and of e^G q.
void SolveRows(const GdnBlock& b, const Fp32Scratch& s, int64_t value_head, const ValueHead& head) {
  const DF df;
  const int64_t dk = b.shape.key_dim;
  const int64_t dv = b.shape.value_dim;
  const int64_t kp = b.layout.key_pitch;
  const int64_t vp = b.layout.value_pitch;
  double sum = b.open == 0 ? 0.0 : *head.decay_sum;
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t t = b.open + i;
    sum += static_cast<double>(b.g.row(i)[value_head]);
    head.decay[t] = static_cast<float>(sum);
    const VF now = hn::Set(df, head.decay[t]);
    for (int64_t j = 0; j <= t; j += kLanes) {
      const VF e = Exp(hn::Sub(now, hn::Load(df, head.decay + j)));
      hn::Store(hn::Mul(hn::Load(df, s.dots + i * kGdnChunk + j), e), df, s.a + i * kGdnChunk + j);
      hn::Store(hn::Mul(hn::Load(df, s.dots + (b.rows + i) * kGdnChunk + j), e), df, s.p + i * kGdnChunk + j);
    }
    const VF from_start = Exp(now);
    const VF beta = hn::Set(df, b.beta.row(i)[value_head]);
    const float* v = b.qkv.row(i) + 2 * b.shape.key_width() + value_head * dv;
    float* u = head.solved + t * (vp + kp);
    float* w = u + vp;
    std::fill(u + dv, w, 0.0f);
    std::fill(w + dk, w + kp, 0.0f);
    MapRow(v, u, dv, [=](VF x) { return hn::Mul(x, beta); });
    MapRow(s.kq + i * dk, w, dk, [=](VF x) { return hn::Mul(x, from_start); });
    MapRow(s.kq + (b.rows + i) * dk, s.wq + (b.rows + i) * dk, dk, [=](VF x) { return hn::Mul(x, from_start); });
    SolveRow<kSolveVectors>(s.a + i * kGdnChunk, t, head.solved, vp + kp, 0);
    std::copy_n(w, dk, s.wq + i * dk);
  }
  *head.decay_sum = sum;
}

// v' and o of the block's rows; o in s.x's second half.
void NewValuesAndOutput(const GdnBlock& b, const Fp32Scratch& s, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dk = b.shape.key_dim;
  if (b.first_chunk) {
    std::fill_n(s.x, 2 * b.rows * vp, 0.0f);
  } else {
    MatMul<Start::kZero>(2 * b.rows, vp, dk, s.wq, dk, head.state, vp, s.x, vp);
  }
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* u = head.solved + (b.open + i) * (vp + b.layout.key_pitch);
    float* new_values = head.new_values + (b.open + i) * vp;
    for (int64_t c = 0; c < vp; c += kLanes)
      hn::Store(hn::Sub(hn::Load(df, u + c), hn::Load(df, s.x + i * vp + c)), df, new_values + c);
  }
  std::fill_n(s.pv, b.rows * vp, 0.0f);
  LowerTriangle(b.rows, b.open, /*diagonal=*/true, vp, s.p, head.new_values, vp, s.pv, vp);
  float* o = s.x + b.rows * vp;
  for (int64_t i = 0; i < b.rows * vp; i += kLanes)
    hn::Store(hn::Add(hn::Load(df, o + i), hn::Load(df, s.pv + i)), df, o + i);
}

// S' from S and the chunk's 64 rows.
void CloseChunk(const GdnBlock& b, const Fp32Scratch& s, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dk = b.shape.key_dim;
  const VF last = hn::Set(df, head.decay[kGdnChunk - 1]);
  for (int64_t j = 0; j < kGdnChunk; j += kLanes) {
    const VF factor = Exp(hn::Sub(last, hn::Load(df, head.decay + j)));
    for (int64_t d = 0; d < dk; ++d) {
      const int64_t at = d * kGdnChunk + j;
      hn::Store(hn::Mul(hn::Load(df, s.key_rows + at), factor), df, s.scaled + at);
    }
  }
  const VF whole = Exp(last);
  for (int64_t d = 0; d < dk; d += kStateRows) {
    const int64_t rows = std::min(kStateRows, dk - d);
    float* state = head.state + d * vp;
    MatMul<Start::kZero>(rows, vp, kGdnChunk, s.scaled + d * kGdnChunk, kGdnChunk, head.new_values, vp, s.update, vp);
    for (int64_t i = 0; i < rows * vp; i += kLanes) {
      const VF update = hn::Load(df, s.update + i);
      hn::Store(b.first_chunk ? update : hn::Add(hn::Mul(whole, hn::Load(df, state + i)), update), df, state + i);
    }
  }
}

void GdnChunkFp32BlockImpl(const GdnBlock& b) {
  const Fp32Scratch s = Carve(b);
  const int64_t dk = b.shape.key_dim;
  const int64_t dv = b.shape.value_dim;
  const int64_t vp = b.layout.value_pitch;
  const int64_t group = b.shape.value_heads / b.shape.key_heads;
  const bool closes = b.open + b.rows == kGdnChunk;
  const bool bf16 = b.profile.activations == DType::kBF16;
  (bf16 ? PrepareKeys<uint16_t> : PrepareKeys<float>)(b, s);
  if (closes) {
    for (int64_t j = 0; j < kGdnChunk; j += 16) {
      const float* panel = s.panels + j * dk;
      for (int64_t d = 0; d < dk; ++d) std::copy_n(panel + d * 16, 16, s.key_rows + d * kGdnChunk + j);
    }
  }
  for (int64_t h = b.key_head * group; h < (b.key_head + 1) * group; ++h) {
    const ValueHead head(b, h);
    Dots(b, s, h, h == b.key_head * group);
    SolveRows(b, s, h, head);
    NewValuesAndOutput(b, s, head);
    const float* o = s.x + b.rows * vp;
    for (int64_t i = 0; i < b.rows; ++i) {
      float* to = b.out.row(i) + h * dv;
      if (bf16) {
        MapRow(o + i * vp, to, dv, [](VF x) { return RoundBf16(x); });
      } else {
        std::copy_n(o + i * vp, dv, to);
      }
    }
    if (closes) CloseChunk(b, s, head);
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(GdnChunkFp32BlockImpl);

int64_t GdnChunkFp32Scratch(const GdnStateLayout& layout, const GdnShape&) {
  return kGdnBlock * (5 * layout.key_pitch + 4 * kGdnChunk + 3 * layout.value_pitch) +
         3 * layout.key_pitch * kGdnChunk + 8 * layout.value_pitch;
}

void GdnChunkFp32Block(const GdnBlock& block) {
  HWY_DYNAMIC_DISPATCH(GdnChunkFp32BlockImpl)(block);
}

}  // namespace lockstep
#endif  // HWY_ONCE

// kChunkFp32: the chunk program as transformers' torch_chunk_gated_delta_rule defines it, fp32 between its inputs and
// its output, row by row:
//
//   A_tj = beta_t (k_t . k_j) e^(G_t - G_j);   P_tj = (q_t . k_j) e^(G_t - G_j)
//   v'_t = beta_t v_t - beta_t e^G_t (k_t S) - sum_{j<t} A_tj v'_j
//   o_t  = e^G_t (q_t S) + sum_{j<=t} P_tj v'_j
//   S'   = e^G_63 S + sum_j k_j (e^(G_63 - G_j) v'_j)
//
// v' is the triangular solve one row at a time, so no inverse is kept. All sums are fma chains over ascending j or d_k.
// A decode row reads S, 4 d_k (t + 1) bytes of keys and 4 d_v t of v' (at 96 x 192: 73.7 KB + 1.2 KB per open row);
// S is written once in 64 rows.
#include <algorithm>
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

struct Fp32Scratch {
  float* kq;        // [2 rows, d_k]: k of the block, then q (scaled by d_k^-0.5)
  float* dots;      // [2 rows, 64]: k_t . k_j, q_t . k_j
  float* a;         // [rows, 64]: -A
  float* p;         // [rows, 64]
  float* x;         // [2 rows, d_v]: k S, then q S, which becomes o
  float* key_rows;  // [d_k, 64]: the chunk's keys, at its end
};

Fp32Scratch Carve(const GdnBlock& block) {
  Fp32Scratch s;
  s.kq = block.scratch;
  s.dots = s.kq + 2 * kGdnBlock * block.layout.key_pitch;
  s.a = s.dots + 2 * kGdnBlock * kGdnChunk;
  s.p = s.a + kGdnBlock * kGdnChunk;
  s.x = s.p + kGdnBlock * kGdnChunk;
  s.key_rows = s.x + 2 * kGdnBlock * block.layout.value_pitch;
  return s;
}

// Normalised k and q into scratch, k into the chunk's panels as well; then both against all keys up to the block's
// last.
void KeysAndDots(const GdnBlock& b, const Fp32Scratch& s, float* panels) {
  const int64_t dk = b.shape.key_dim;
  const DF df;
  const VF scale = hn::Set(df, 1.0f / std::sqrt(static_cast<float>(dk)));
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* q = b.qkv.row(i) + b.key_head * dk;
    const float* k = q + b.shape.key_width();
    float* k_out = s.kq + i * dk;
    const VF k_factor = hn::Set(df, InverseNorm(k, dk));
    const VF q_factor = hn::Set(df, InverseNorm(q, dk));
    MapRow(k, k_out, dk, [=](VF x) { return hn::Mul(x, k_factor); });
    MapRow(q, s.kq + (b.rows + i) * dk, dk, [=](VF x) { return hn::Mul(hn::Mul(x, q_factor), scale); });
    const int64_t t = b.open + i;
    float* column = panels + t / 16 * dk * 16 + t % 16;
    for (int64_t d = 0; d < dk; ++d) column[d * 16] = k_out[d];
  }
  const float* panel[4];
  for (int64_t p = 0; p < 4; ++p) panel[p] = panels + p * dk * 16;
  DotPanels(2 * b.rows, (b.open + b.rows + 15) / 16, dk, s.kq, dk, panel, s.dots, kGdnChunk);
}

// The block's rows of -A and P, and v'_t and o_t as far as S gives them.
void StartRows(const GdnBlock& b, const Fp32Scratch& s, int64_t value_head, float* decay, float* new_values) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dv = b.shape.value_dim;
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t t = b.open + i;
    const float beta = b.beta.row(i)[value_head];
    decay[t] = (t == 0 ? 0.0f : decay[t - 1]) + b.g.row(i)[value_head];
    const VF now = hn::Set(df, decay[t]);
    const VF beta_v = hn::Set(df, beta);
    for (int64_t j = 0; j <= t; j += kLanes) {
      const VF e = Exp(hn::Sub(now, hn::Load(df, decay + j)));
      const VF kk = hn::Load(df, s.dots + i * kGdnChunk + j);
      const VF qk = hn::Load(df, s.dots + (b.rows + i) * kGdnChunk + j);
      hn::Store(hn::Neg(hn::Mul(hn::Mul(kk, e), beta_v)), df, s.a + i * kGdnChunk + j);
      hn::Store(hn::Mul(qk, e), df, s.p + i * kGdnChunk + j);
    }
    const VF from_start = Exp(now);
    const VF minus_beta_decay = hn::Neg(hn::Mul(beta_v, from_start));
    const float* v = b.qkv.row(i) + 2 * b.shape.key_width() + value_head * dv;
    float* row = new_values + t * vp;
    const float* ks = s.x + i * vp;
    float* qs = s.x + (b.rows + i) * vp;
    for (int64_t c = 0; c < vp; c += kLanes) {
      const int64_t left = dv - c;
      const VF value =
          left >= static_cast<int64_t>(kLanes) ? hn::LoadU(df, v + c) : LoadFirst(v + c, left > 0 ? left : 0);
      hn::Store(hn::MulAdd(minus_beta_decay, hn::Load(df, ks + c), hn::Mul(beta_v, value)), df, row + c);
      hn::Store(hn::Mul(from_start, hn::Load(df, qs + c)), df, qs + c);
    }
  }
}

// S' from S and the chunk's 64 rows; v' is used up.
void CloseChunk(const GdnBlock& b, const Fp32Scratch& s, const float* decay, float* new_values, float* state) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dk = b.shape.key_dim;
  const VF last = hn::Set(df, decay[kGdnChunk - 1]);
  HWY_ALIGN float factor[kGdnChunk];
  for (int64_t j = 0; j < kGdnChunk; j += kLanes)
    hn::Store(Exp(hn::Sub(last, hn::Load(df, decay + j))), df, factor + j);
  for (int64_t j = 0; j < kGdnChunk; ++j) {
    const VF f = hn::Set(df, factor[j]);
    for (int64_t c = 0; c < vp; c += kLanes)
      hn::Store(hn::Mul(f, hn::Load(df, new_values + j * vp + c)), df, new_values + j * vp + c);
  }
  if (b.first_chunk) {
    MatMul<Start::kZero>(dk, vp, kGdnChunk, s.key_rows, kGdnChunk, new_values, vp, state, vp);
    return;
  }
  const VF whole = Exp(last);
  for (int64_t i = 0; i < dk * vp; i += kLanes) hn::Store(hn::Mul(whole, hn::Load(df, state + i)), df, state + i);
  MatMul<Start::kOutput>(dk, vp, kGdnChunk, s.key_rows, kGdnChunk, new_values, vp, state, vp);
}

void GdnChunkFp32BlockImpl(const GdnBlock& b) {
  const Fp32Scratch s = Carve(b);
  const int64_t dk = b.shape.key_dim;
  const int64_t dv = b.shape.value_dim;
  const int64_t vp = b.layout.value_pitch;
  const int64_t group = b.shape.value_heads / b.shape.key_heads;
  const bool closes = b.open + b.rows == kGdnChunk;
  const bool bf16_out = b.profile.activations == DType::kBF16;
  float* panels = reinterpret_cast<float*>(b.slot + b.layout.key_heads + b.key_head * b.layout.key_head_bytes);
  KeysAndDots(b, s, panels);
  if (closes) {
    for (int64_t j = 0; j < kGdnChunk; j += 16) {
      const float* panel = panels + j * dk;
      for (int64_t d = 0; d < dk; ++d) std::copy_n(panel + d * 16, 16, s.key_rows + d * kGdnChunk + j);
    }
  }
  for (int64_t h = b.key_head * group; h < (b.key_head + 1) * group; ++h) {
    std::byte* head = b.slot + b.layout.value_heads + h * b.layout.value_head_bytes;
    float* state = reinterpret_cast<float*>(head + b.layout.state);
    float* decay = reinterpret_cast<float*>(head + b.layout.decay);
    float* new_values = reinterpret_cast<float*>(head + b.layout.new_values);
    float* o = s.x + b.rows * vp;
    if (b.first_chunk) {
      std::fill_n(s.x, 2 * b.rows * vp, 0.0f);
    } else {
      MatMul<Start::kZero>(2 * b.rows, vp, dk, s.kq, dk, state, vp, s.x, vp);
    }
    StartRows(b, s, h, decay, new_values);
    LowerTriangle(b.rows, b.open, /*diagonal=*/false, vp, s.a, new_values, vp, new_values + b.open * vp, vp);
    LowerTriangle(b.rows, b.open, /*diagonal=*/true, vp, s.p, new_values, vp, o, vp);
    for (int64_t i = 0; i < b.rows; ++i) {
      float* to = b.out.row(i) + h * dv;
      if (bf16_out) {
        MapRow(o + i * vp, to, dv, [](VF x) { return RoundBf16(x); });
      } else {
        std::copy_n(o + i * vp, dv, to);
      }
    }
    if (closes) CloseChunk(b, s, decay, new_values, state);
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

int64_t GdnChunkFp32Scratch(const GdnStateLayout& layout, const GdnShape& shape) {
  return 2 * kGdnBlock * layout.key_pitch + 4 * kGdnBlock * kGdnChunk + 2 * kGdnBlock * layout.value_pitch +
         shape.key_dim * kGdnChunk;
}

void GdnChunkFp32Block(const GdnBlock& block) {
  HWY_DYNAMIC_DISPATCH(GdnChunkFp32BlockImpl)(block);
}

}  // namespace lockstep
#endif  // HWY_ONCE

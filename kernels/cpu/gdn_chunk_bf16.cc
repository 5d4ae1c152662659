// kChunkBf16: the chunk program with flash-linear-attention's casts (docs/numerics.md has the table), fp32 fma chains
// where the GPU has tensor cores. G is the chunk's running sum of g, times log2(e); bf16(.) rounds:
//
//   A_tj = (k_t . k_j) 2^(G_t - G_j) beta_t
//   T_t  = e_t - sum_{j<t} A_tj T_j                                    rows of (I + A)^-1, fp32
//   u_t  = bf16(sum_{j<=t} bf16(T_tj) bf16(beta_j v_j))
//   w_t  = bf16(sum_{j<=t} bf16(T_tj) bf16(bf16(beta_j k_j) 2^G_j))
//   v'_t = u_t - w_t bf16(S)
//   P_tj = bf16((q_t . k_j) 2^(G_t - G_j))
//   o_t  = bf16(fma(scale, (q_t bf16(S)) 2^G_t, scale * sum_{j<=t} P_tj bf16(v'_j)))
//   S'   = 2^G_63 S + sum_j k_j bf16(v'_j 2^(G_63 - G_j))              v' unrounded here
//
// A decode row reads the bf16 image of S (36.9 KB at 96 x 192) and about 1.4 KB per open row.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/gdn_chunk.h"
#include "kernels/float_bits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gdn_chunk_bf16.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/gdn_rows-inl.h"
#include "kernels/cpu/row_matrix-inl.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// 2^x, x <= 128: x = n + r, |r| <= 1/2, 2^r = e^(r ln 2) by a polynomial of degree 7 (truncation below 2^-27), scaled
// in two normal factors.
VF Exp2(VF x) {
  const DF df;
  const DI di;
  const VF clamped = hn::Min(hn::Max(x, hn::Set(df, -151.0f)), hn::Set(df, 129.0f));
  const VF n = hn::Round(clamped);
  const VF r = hn::Mul(hn::Sub(clamped, n), hn::Set(df, 0x1.62e43p-1f));
  VF p = hn::Set(df, 1.0f / 5040);
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 720));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 120));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 24));
  p = hn::MulAdd(p, r, hn::Set(df, 1.0f / 6));
  p = hn::MulAdd(p, r, hn::Set(df, 0.5f));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), hn::Set(df, 1.0f));
  const auto exponent = hn::ConvertTo(di, n);
  const auto first = hn::ShiftRight<1>(exponent);
  const auto second = hn::Sub(exponent, first);
  const auto bias = hn::Set(di, 127);
  const VF scale1 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(first, bias)));
  const VF scale2 = hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(second, bias)));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Mul(hn::Mul(p, scale1), scale2));
}

struct Bf16Scratch {
  float* kqw;   // [3 rows, key_pitch]: k, q, w of the block (k . and q . share a product over keys, q and w one over S)
  float* dots;  // [2 rows, 64]: k_t . k_j, q_t . k_j
  float* a;     // [rows, 64]: -A
  float* p;     // [rows, 64]
  float* t;     // [rows, 64]: bf16(T)
  float* u;     // [rows, d_v]
  float* x;     // [2 rows, d_v]: q S, then w S
  float* pv;    // [rows, d_v]
  float* key_rows;  // [d_k, 64]: the chunk's keys, at its end
};

Bf16Scratch Carve(const GdnBlock& block) {
  Bf16Scratch s;
  s.kqw = block.scratch;
  s.dots = s.kqw + 3 * kGdnBlock * block.layout.key_pitch;
  s.a = s.dots + 2 * kGdnBlock * kGdnChunk;
  s.p = s.a + kGdnBlock * kGdnChunk;
  s.t = s.p + kGdnBlock * kGdnChunk;
  s.u = s.t + kGdnBlock * kGdnChunk;
  s.x = s.u + kGdnBlock * block.layout.value_pitch;
  s.pv = s.x + 2 * kGdnBlock * block.layout.value_pitch;
  s.key_rows = s.pv + kGdnBlock * block.layout.value_pitch;
  return s;
}

// What the state keeps of a value head.
struct ValueHead {
  ValueHead(const GdnBlock& b, int64_t h)
      : ValueHead(b.layout, b.slot + b.layout.value_heads + h * b.layout.value_head_bytes) {}
  ValueHead(const GdnStateLayout& l, std::byte* head)
      : state(reinterpret_cast<float*>(head + l.state)),
        decay(reinterpret_cast<float*>(head + l.decay)),
        inverse(reinterpret_cast<float*>(head + l.inverse)),
        new_values(reinterpret_cast<float*>(head + l.new_values)),
        image(reinterpret_cast<uint16_t*>(head + l.state_image)),
        beta_values(reinterpret_cast<uint16_t*>(head + l.beta_values)),
        beta_keys(reinterpret_cast<uint16_t*>(head + l.beta_keys)),
        new_values_bf16(reinterpret_cast<uint16_t*>(head + l.new_values_bf16)) {}

  float* state;               // [d_k, d_v]
  float* decay;               // [64] running sums of g: G without log2(e)
  float* inverse;             // [64, 64]: T
  float* new_values;          // [64, d_v]: v'
  uint16_t* image;            // [d_k, d_v]: bf16(S)
  uint16_t* beta_values;      // [64, d_v]: bf16(beta v)
  uint16_t* beta_keys;        // [64, d_k]: bf16(bf16(beta k) 2^G)
  uint16_t* new_values_bf16;  // [64, d_v]
};

VF Log2Decay(VF running_sum) {
  return hn::Mul(running_sum, hn::Set(DF(), 0x1.715476p+0f));
}

void KeysAndDots(const GdnBlock& b, const Bf16Scratch& s, uint16_t* panels) {
  const DF df;
  const int64_t dk = b.shape.key_dim;
  const int64_t kp = b.layout.key_pitch;
  std::fill_n(s.kqw, 2 * b.rows * kp, 0.0f);
  for (int64_t i = 0; i < b.rows; ++i) {
    const float* q = b.qkv.row(i) + b.key_head * dk;
    const float* k = q + b.shape.key_width();
    float* k_out = s.kqw + i * kp;
    const VF k_factor = hn::Set(df, InverseNorm(b.profile.square_sum, k, dk));
    const VF q_factor = hn::Set(df, InverseNorm(b.profile.square_sum, q, dk));
    MapRow(k, k_out, dk, [=](VF x) { return RoundBf16(hn::Mul(x, k_factor)); });
    MapRow(q, s.kqw + (b.rows + i) * kp, dk, [=](VF x) { return RoundBf16(hn::Mul(x, q_factor)); });
    const int64_t t = b.open + i;
    uint16_t* column = panels + t / 16 * dk * 16 + t % 16;
    for (int64_t d = 0; d < dk; ++d) column[d * 16] = F32ToBf16(k_out[d]);
  }
  const uint16_t* panel[4];
  for (int64_t p = 0; p < 4; ++p) panel[p] = panels + p * dk * 16;
  DotPanels(2 * b.rows, (b.open + b.rows + 15) / 16, dk, s.kqw, kp, panel, s.dots, kGdnChunk);
}

// Rows of -A, P, bf16(beta v), bf16(bf16(beta k) 2^G), and e_t in T's place.
void StartRows(const GdnBlock& b, const Bf16Scratch& s, int64_t value_head, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t kp = b.layout.key_pitch;
  const int64_t dv = b.shape.value_dim;
  for (int64_t i = 0; i < b.rows; ++i) {
    const int64_t t = b.open + i;
    head.decay[t] = (t == 0 ? 0.0f : head.decay[t - 1]) + b.g.row(i)[value_head];
    const VF now = Log2Decay(hn::Set(df, head.decay[t]));
    const VF beta = hn::Set(df, b.beta.row(i)[value_head]);
    for (int64_t j = 0; j <= t; j += kLanes) {
      const VF e = Exp2(hn::Sub(now, Log2Decay(hn::Load(df, head.decay + j))));
      const VF kk = hn::Load(df, s.dots + i * kGdnChunk + j);
      const VF qk = hn::Load(df, s.dots + (b.rows + i) * kGdnChunk + j);
      hn::Store(hn::Neg(hn::Mul(hn::Mul(kk, e), beta)), df, s.a + i * kGdnChunk + j);
      hn::Store(RoundBf16(hn::Mul(qk, e)), df, s.p + i * kGdnChunk + j);
    }
    float* unit = head.inverse + t * kGdnChunk;
    std::fill_n(unit, kGdnChunk, 0.0f);
    unit[t] = 1.0f;
    const VF from_start = Exp2(now);
    const float* k = s.kqw + i * kp;
    for (int64_t c = 0; c < kp; c += kLanes) {
      const VF beta_k = RoundBf16(hn::Mul(hn::Load(df, k + c), beta));
      StoreBf16(RoundBf16(hn::Mul(beta_k, from_start)), head.beta_keys + t * kp + c);
    }
    const float* v = b.qkv.row(i) + 2 * b.shape.key_width() + value_head * dv;
    for (int64_t c = 0; c < vp; c += kLanes) {
      const int64_t left = dv - c;
      const VF value =
          left >= static_cast<int64_t>(kLanes) ? hn::LoadU(df, v + c) : LoadFirst(v + c, left > 0 ? left : 0);
      StoreBf16(RoundBf16(hn::Mul(value, beta)), head.beta_values + t * vp + c);
    }
  }
}

void RoundAll(float* x, int64_t count) {
  const DF df;
  for (int64_t i = 0; i < count; i += kLanes) hn::Store(RoundBf16(hn::Load(df, x + i)), df, x + i);
}

// T, u, w and v' of the block's rows; q S stays in s.x.
void SolveRows(const GdnBlock& b, const Bf16Scratch& s, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t kp = b.layout.key_pitch;
  float* t_rows = head.inverse + b.open * kGdnChunk;
  // Columns right of the diagonal are zero and stay zero.
  const int64_t t_columns = (b.open + b.rows + 15) / 16 * 16;
  LowerTriangle(b.rows, b.open, /*diagonal=*/false, t_columns, s.a, head.inverse, kGdnChunk, t_rows, kGdnChunk);
  for (int64_t i = 0; i < b.rows * kGdnChunk; i += kLanes) hn::Store(RoundBf16(hn::Load(df, t_rows + i)), df, s.t + i);

  float* w = s.kqw + 2 * b.rows * kp;
  std::fill_n(s.u, b.rows * vp, 0.0f);
  std::fill_n(w, b.rows * kp, 0.0f);
  LowerTriangle(b.rows, b.open, /*diagonal=*/true, vp, s.t, head.beta_values, vp, s.u, vp);
  LowerTriangle(b.rows, b.open, /*diagonal=*/true, kp, s.t, head.beta_keys, kp, w, kp);
  RoundAll(s.u, b.rows * vp);
  RoundAll(w, b.rows * kp);

  if (b.first_chunk) {
    std::fill_n(s.x, 2 * b.rows * vp, 0.0f);
  } else {
    MatMul<Start::kZero>(2 * b.rows, vp, b.shape.key_dim, s.kqw + b.rows * kp, kp, head.image, vp, s.x, vp);
  }
  const float* ws = s.x + b.rows * vp;
  float* new_values = head.new_values + b.open * vp;
  uint16_t* rounded = head.new_values_bf16 + b.open * vp;
  for (int64_t i = 0; i < b.rows * vp; i += kLanes) {
    const VF v = hn::Sub(hn::Load(df, s.u + i), hn::Load(df, ws + i));
    hn::Store(v, df, new_values + i);
    StoreBf16(RoundBf16(v), rounded + i);
  }
}

void WriteOutput(const GdnBlock& b, const Bf16Scratch& s, int64_t value_head, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dv = b.shape.value_dim;
  std::fill_n(s.pv, b.rows * vp, 0.0f);
  LowerTriangle(b.rows, b.open, /*diagonal=*/true, vp, s.p, head.new_values_bf16, vp, s.pv, vp);
  const VF scale = hn::Set(df, 1.0f / std::sqrt(static_cast<float>(b.shape.key_dim)));
  for (int64_t i = 0; i < b.rows; ++i) {
    const VF from_start = Exp2(Log2Decay(hn::Set(df, head.decay[b.open + i])));
    const float* qs = s.x + i * vp;
    float* o = s.pv + i * vp;
    for (int64_t c = 0; c < vp; c += kLanes) {
      const VF far = hn::Mul(hn::Load(df, qs + c), from_start);
      hn::Store(RoundBf16(hn::MulAdd(far, scale, hn::Mul(hn::Load(df, o + c), scale))), df, o + c);
    }
    std::copy_n(o, dv, b.out.row(i) + value_head * dv);
  }
}

void CloseChunk(const GdnBlock& b, const Bf16Scratch& s, const ValueHead& head) {
  const DF df;
  const int64_t vp = b.layout.value_pitch;
  const int64_t dk = b.shape.key_dim;
  const VF last = Log2Decay(hn::Set(df, head.decay[kGdnChunk - 1]));
  HWY_ALIGN float factor[kGdnChunk];
  for (int64_t j = 0; j < kGdnChunk; j += kLanes) {
    hn::Store(Exp2(hn::Sub(last, Log2Decay(hn::Load(df, head.decay + j)))), df, factor + j);
  }
  for (int64_t j = 0; j < kGdnChunk; ++j) {
    const VF f = hn::Set(df, factor[j]);
    float* row = head.new_values + j * vp;
    for (int64_t c = 0; c < vp; c += kLanes) hn::Store(RoundBf16(hn::Mul(hn::Load(df, row + c), f)), df, row + c);
  }
  const VF whole = Exp2(last);
  if (b.first_chunk) {
    std::fill_n(head.state, dk * vp, 0.0f);
  } else {
    for (int64_t i = 0; i < dk * vp; i += kLanes)
      hn::Store(hn::Mul(whole, hn::Load(df, head.state + i)), df, head.state + i);
  }
  MatMul<Start::kOutput>(dk, vp, kGdnChunk, s.key_rows, kGdnChunk, head.new_values, vp, head.state, vp);
  for (int64_t i = 0; i < dk * vp; i += kLanes) StoreBf16(RoundBf16(hn::Load(df, head.state + i)), head.image + i);
}

void GdnChunkBf16BlockImpl(const GdnBlock& b) {
  const DF df;
  const Bf16Scratch s = Carve(b);
  const int64_t dk = b.shape.key_dim;
  const int64_t group = b.shape.value_heads / b.shape.key_heads;
  const bool closes = b.open + b.rows == kGdnChunk;
  uint16_t* panels = reinterpret_cast<uint16_t*>(b.slot + b.layout.key_heads + b.key_head * b.layout.key_head_bytes);
  KeysAndDots(b, s, panels);
  if (closes) {
    for (int64_t j = 0; j < kGdnChunk; j += kLanes) {
      const uint16_t* panel = panels + j / 16 * dk * 16 + j % 16;
      for (int64_t d = 0; d < dk; ++d) hn::Store(LoadWide(panel + d * 16), df, s.key_rows + d * kGdnChunk + j);
    }
  }
  for (int64_t h = b.key_head * group; h < (b.key_head + 1) * group; ++h) {
    const ValueHead head(b, h);
    StartRows(b, s, h, head);
    SolveRows(b, s, head);
    WriteOutput(b, s, h, head);
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
HWY_EXPORT(GdnChunkBf16BlockImpl);

int64_t GdnChunkBf16Scratch(const GdnStateLayout& layout, const GdnShape& shape) {
  return 3 * kGdnBlock * layout.key_pitch + 5 * kGdnBlock * kGdnChunk + 4 * kGdnBlock * layout.value_pitch +
         shape.key_dim * kGdnChunk;
}

void GdnChunkBf16Block(const GdnBlock& block) {
  HWY_DYNAMIC_DISPATCH(GdnChunkBf16BlockImpl)(block);
}

}  // namespace lockstep
#endif  // HWY_ONCE

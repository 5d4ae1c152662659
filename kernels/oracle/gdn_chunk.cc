#include "kernels/oracle/gdn_chunk.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/float_bits.h"

namespace lockstep::oracle {
namespace {

constexpr int kBlock = 16;  // of the inverse
constexpr float kLog2E = 1.4426950408889634f;

Factor Bf16Factor(uint16_t value) {
  return MakeFactor(Bf16ToF32(value));
}

FactorMatrix RowFactors(const uint16_t* values, int width) {
  return FactorMatrix::Of(1, width, [&](int, int k) { return Bf16ToF32(values[k]); });
}

// A Hillis-Steele scan by the 32 lanes of a warp.
void ScanWarp(float* values) {
  for (int distance = 1; distance < 32; distance *= 2) {
    for (int i = 31; i >= distance; --i) values[i] = values[i - distance] + values[i];
  }
}

// Steps of one 16-deep tf32 product: factors in the order of their groups.
using BlockFactors = Factor[kBlock];

}  // namespace

GdnChunk::GdnChunk(GdnHeadShape shape, const float* state, float scale, Function exp2)
    : decay(kGdnChunk),
      gram(kGdnChunk * kGdnChunk),
      merge(kGdnChunk * kGdnChunk),
      inverse(kGdnChunk * kGdnChunk),
      u(kGdnChunk * shape.value_dim),
      w(kGdnChunk * shape.key_dim),
      score(kGdnChunk * kGdnChunk),
      delta(kGdnChunk * shape.value_dim),
      o(kGdnChunk * shape.value_dim),
      shape_(shape),
      scale_(scale),
      exp2_(exp2),
      state_(shape.key_dim * shape.value_dim),
      log_decay_(kGdnChunk),
      state_image_(shape.value_dim, shape.key_dim),
      k_(kGdnChunk, shape.key_dim),
      beta_v_(shape.value_dim, kGdnChunk),
      beta_k_(shape.key_dim, kGdnChunk),
      delta_image_(shape.value_dim, kGdnChunk) {
  assert(shape.key_dim % kBf16Group == 0 && shape.value_dim % kBf16Group == 0);
  if (state == nullptr) return;
  std::copy_n(state, state_.size(), state_.begin());
  state_image_ = FactorMatrix::Of(shape.value_dim, shape.key_dim,
                                  [&](int d, int x) { return RoundBf16(state_[x * shape.value_dim + d]); });
}

void GdnChunk::Append(const GdnRow& row) {
  assert(rows_ < kGdnChunk);
  log_decay_[rows_] = row.g;
  AppendDecay();
  AppendGram(row);
  AppendDiagonalInverse();
  AppendMergedInverse();
  AppendDelta(row);
  AppendOutput(row);
  ++rows_;
}

void GdnChunk::AppendDecay() {
  float sums[kGdnChunk];
  std::copy(log_decay_.begin(), log_decay_.end(), sums);
  ScanWarp(sums);
  ScanWarp(sums + 32);
  const float sum = rows_ < 32 ? sums[rows_] : sums[31] + sums[rows_];
  decay[rows_] = sum * kLog2E;
}

void GdnChunk::AppendGram(const GdnRow& row) {
  const int i = rows_;
  const float beta = Bf16ToF32(row.beta);
  for (int x = 0; x < shape_.key_dim; ++x) k_.Row(i)[x] = Bf16Factor(row.k[x]);
  for (int j = 0; j < i; ++j) {
    const float product = Chain(0.0f, k_.Row(i), k_.Row(j));
    gram[i * kGdnChunk + j] = (product * exp2_(decay[i] - decay[j])) * beta;
  }
}

// Row i of the inverse of its own 16x16 block, from the rows above it in the block: fp32, not on tensor cores.
void GdnChunk::AppendDiagonalInverse() {
  const int i = rows_;
  const int first = i / kBlock * kBlock;
  const int local = i - first;
  float a[kBlock] = {};
  for (int c = 0; c < local; ++c) a[c] = -gram[i * kGdnChunk + first + c];
  for (int x = 0; x < local; ++x) {
    // Column x of the rows above, strictly below the diagonal.
    auto above = [&](int c) { return x < c && c < local ? inverse[(first + c) * kGdnChunk + first + x] : 0.0f; };
    float sums[8];
    for (int c = 0; c < 8; ++c) sums[c] = std::fma(a[c], above(c), a[c + 8] * above(c + 8));
    for (int distance = 4; distance >= 1; distance /= 2) {
      for (int c = 0; c < distance; ++c) sums[c] += sums[c + distance];
    }
    inverse[i * kGdnChunk + first + x] = a[x] + sums[0];
  }
  inverse[i * kGdnChunk + i] = 1.0f;
}

// Row i of the blocks left of the diagonal. Block (r, q) of the inverse is -T_rr (sum over b of A_rb T_bq); for q = r -
// 1, where the sum has one term, the kernel takes -(T_rr A_rq) T_qq. First products take the 16 in the order even, odd.
void GdnChunk::AppendMergedInverse() {
  const int i = rows_;
  const int r = i / kBlock;
  const int first = r * kBlock;
  // x . column over a block, from `sum` on; x(k) and column(k) are fp32, cut to tf32.
  auto block_chain = [](float sum, bool even_odd, const auto& x, const auto& column) {
    BlockFactors a, b;
    for (int k = 0; k < kBlock; ++k) {
      const int from = even_odd ? EvenThenOdd(k) : k;
      a[k] = MakeTf32Factor(x(from));
      b[k] = MakeTf32Factor(column(from));
    }
    return Chain(sum, a, b, kTf32Group);
  };
  auto row_of = [](const std::vector<float>& m, int row, int column) {
    return [&m, row, column](int k) { return m[row * kGdnChunk + column + k]; };
  };
  auto column_of = [](const std::vector<float>& m, int row, int column) {
    return [&m, row, column](int k) { return m[(row + k) * kGdnChunk + column]; };
  };
  for (int q = r - 1; q >= 0; --q) {
    for (int j = q * kBlock; j < (q + 1) * kBlock; ++j) {
      float sum = 0.0f;
      if (q == r - 1) {
        sum = block_chain(sum, true, row_of(inverse, i, first), column_of(gram, first, j));
      } else {
        for (int b = q; b < r; ++b) {
          sum = block_chain(sum, true, row_of(gram, i, b * kBlock), column_of(inverse, b * kBlock, j));
        }
      }
      merge[i * kGdnChunk + j] = sum;
    }
    for (int j = q * kBlock; j < (q + 1) * kBlock; ++j) {
      const float product =
          q == r - 1 ? block_chain(0.0f, false, row_of(merge, i, q * kBlock), column_of(inverse, q * kBlock, j))
                     : block_chain(0.0f, false, row_of(inverse, i, first), column_of(merge, first, j));
      inverse[i * kGdnChunk + j] = -product;
    }
  }
}

void GdnChunk::AppendDelta(const GdnRow& row) {
  const int i = rows_;
  const float beta = Bf16ToF32(row.beta);
  const float grown = exp2_(decay[i]);
  for (int d = 0; d < shape_.value_dim; ++d) beta_v_.Row(d)[i] = MakeFactor(RoundBf16(beta * Bf16ToF32(row.v[d])));
  for (int x = 0; x < shape_.key_dim; ++x) {
    beta_k_.Row(x)[i] = MakeFactor(RoundBf16(RoundBf16(beta * Bf16ToF32(row.k[x])) * grown));
  }
  const FactorMatrix t =
      FactorMatrix::Of(1, kGdnChunk, [&](int, int j) { return RoundBf16(inverse[i * kGdnChunk + j]); });
  for (int d = 0; d < shape_.value_dim; ++d) {
    u[i * shape_.value_dim + d] = F32ToBf16(Chain(0.0f, t.Row(0), beta_v_.Row(d)));
  }
  for (int x = 0; x < shape_.key_dim; ++x) {
    w[i * shape_.key_dim + x] = F32ToBf16(Chain(0.0f, t.Row(0), beta_k_.Row(x)));
  }
  const FactorMatrix w_row = RowFactors(&w[i * shape_.key_dim], shape_.key_dim);
  for (int d = 0; d < shape_.value_dim; ++d) {
    const float carried = Chain(0.0f, w_row.Row(0), state_image_.Row(d));
    const float value = Bf16ToF32(u[i * shape_.value_dim + d]) - carried;
    delta[i * shape_.value_dim + d] = value;
    delta_image_.Row(d)[i] = MakeFactor(RoundBf16(value));
  }
}

void GdnChunk::AppendOutput(const GdnRow& row) {
  const int i = rows_;
  const FactorMatrix q = RowFactors(row.q, shape_.key_dim);
  for (int j = 0; j <= i; ++j) {
    const float product = Chain(0.0f, q.Row(0), k_.Row(j));
    score[i * kGdnChunk + j] = F32ToBf16(product * exp2_(decay[i] - decay[j]));
  }
  const FactorMatrix p = RowFactors(&score[i * kGdnChunk], kGdnChunk);
  const float grown = exp2_(decay[i]);
  for (int d = 0; d < shape_.value_dim; ++d) {
    const float from_state = Chain(0.0f, q.Row(0), state_image_.Row(d)) * grown;
    const float from_chunk = Chain(0.0f, p.Row(0), delta_image_.Row(d));
    o[i * shape_.value_dim + d] = F32ToBf16(std::fma(from_state, scale_, from_chunk * scale_));
  }
}

std::vector<float> GdnChunk::NextState() const {
  assert(rows_ > 0);
  const float last = decay[rows_ - 1];
  const float grown = exp2_(last);
  FactorMatrix k_columns(shape_.key_dim, kGdnChunk);
  for (int x = 0; x < shape_.key_dim; ++x) {
    for (int j = 0; j < rows_; ++j) k_columns.Row(x)[j] = k_.Row(j)[x];
  }
  std::vector<float> ages(rows_);  // what of row j is left at the last row
  for (int j = 0; j < rows_; ++j) ages[j] = exp2_(last - decay[j]);
  std::vector<float> next(state_.size());
  for (int d = 0; d < shape_.value_dim; ++d) {
    const FactorMatrix values = FactorMatrix::Of(1, kGdnChunk, [&](int, int j) {
      return j < rows_ ? RoundBf16(delta[j * shape_.value_dim + d] * ages[j]) : 0.0f;
    });
    for (int x = 0; x < shape_.key_dim; ++x) {
      const int at = x * shape_.value_dim + d;
      next[at] = Chain(state_[at] * grown, k_columns.Row(x), values.Row(0));
    }
  }
  return next;
}

void GdnForward(const GdnSequence& s, float* state, uint16_t* o) {
  const int key_dim = s.head.key_dim;
  const int value_dim = s.head.value_dim;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(key_dim)));
  for (int h = 0; h < s.value_heads; ++h) {
    const int key_head = h / (s.value_heads / s.key_heads);
    float* head_state = state + static_cast<int64_t>(h) * key_dim * value_dim;
    for (int begin = 0; begin < s.rows; begin += kGdnChunk) {
      GdnChunk chunk(s.head, head_state, scale);
      for (int t = begin; t < std::min(s.rows, begin + kGdnChunk); ++t) {
        const int64_t key_row = static_cast<int64_t>(t) * s.key_heads + key_head;
        const int64_t value_row = static_cast<int64_t>(t) * s.value_heads + h;
        chunk.Append({.q = s.q + key_row * key_dim,
                      .k = s.k + key_row * key_dim,
                      .v = s.v + value_row * value_dim,
                      .g = s.g[value_row],
                      .beta = s.beta[value_row]});
        std::copy_n(&chunk.o[(t - begin) * value_dim], value_dim, o + value_row * value_dim);
      }
      if (chunk.rows() == kGdnChunk) std::ranges::copy(chunk.NextState(), head_state);
    }
  }
}

}  // namespace lockstep::oracle

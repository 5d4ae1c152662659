// The chunk program against every intermediate that a GPU recorded (tests/data/gdn_fixture, tests/data/gpu_bits): from
// the inputs on, nothing in between is taken from the recording. Then what each plausible but wrong order would get
// wrong.
#include "kernels/oracle/gdn_chunk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

constexpr int kRows = 130;
constexpr GdnHeadShape kShape = {.key_dim = 96, .value_dim = 192};
const float kScale = static_cast<float>(1.0 / std::sqrt(96.0));

struct Recording {
  std::vector<uint16_t> q = ReadData<uint16_t>("gpu_bits/gdn_qn.bf16");
  std::vector<uint16_t> k = ReadData<uint16_t>("gpu_bits/gdn_kn.bf16");
  std::vector<uint16_t> v = ReadData<uint16_t>("gdn_fixture/v.bf16");
  std::vector<float> g = ReadData<float>("gdn_fixture/g.f32");
  std::vector<float> beta = ReadData<float>("gdn_fixture/beta.f32");
  std::vector<float> decay = ReadData<float>("gpu_bits/gdn_decay.f32");
  std::vector<float> gram = ReadData<float>("gpu_bits/gdn_gram.f32");
  std::vector<float> inverse = ReadData<float>("gpu_bits/gdn_inverse.f32");
  std::vector<uint16_t> w = ReadData<uint16_t>("gpu_bits/gdn_w.bf16");
  std::vector<uint16_t> u = ReadData<uint16_t>("gpu_bits/gdn_u.bf16");
  std::vector<uint16_t> delta = ReadData<uint16_t>("gpu_bits/gdn_delta.bf16");
  std::vector<uint16_t> o = ReadData<uint16_t>("gdn_fixture/o.bf16");
  std::vector<float> state2 = ReadData<float>("gpu_bits/gdn_state2.f32");  // after two chunks

  GdnRow Row(int t) const {
    return {.q = &q[t * kShape.key_dim],
            .k = &k[t * kShape.key_dim],
            .v = &v[t * kShape.value_dim],
            .g = g[t],
            .beta = F32ToBf16(beta[t])};
  }
};

const Recording& Gpu() {
  static const Recording recording;
  return recording;
}

// The recording's chunks, and the state after each.
struct ChunkRun {
  std::vector<GdnChunk> chunks;
  std::vector<std::vector<float>> states = {std::vector<float>(kShape.key_dim * kShape.value_dim, 0.0f)};
};

ChunkRun RunRecording(Function exp2 = Exp2Approx) {
  ChunkRun run;
  for (int begin = 0; begin < kRows; begin += kGdnChunk) {
    GdnChunk& chunk = run.chunks.emplace_back(kShape, run.states.back().data(), kScale, exp2);
    for (int t = begin; t < std::min(kRows, begin + kGdnChunk); ++t) chunk.Append(Gpu().Row(t));
    run.states.push_back(chunk.NextState());
  }
  return run;
}

const ChunkRun& Ours() {
  static const ChunkRun run = RunRecording();
  return run;
}

// Rows of all chunks, as the recording has them. Columns past the diagonal of a square are left out.
template <class T>
std::vector<T> Gather(const ChunkRun& run, std::vector<T> GdnChunk::*member, int width, int past_diagonal = 1 << 20) {
  std::vector<T> all;
  for (const GdnChunk& chunk : run.chunks) {
    for (int i = 0; i < chunk.rows(); ++i) {
      for (int j = 0; j < std::min(width, i + past_diagonal); ++j) all.push_back((chunk.*member)[i * width + j]);
    }
  }
  return all;
}

std::vector<float> LowerTriangle(const std::vector<float>& squares, int past_diagonal) {
  std::vector<float> all;
  for (int t = 0; t < kRows; ++t) {
    for (int j = 0; j < t % kGdnChunk + past_diagonal; ++j) all.push_back(squares[t * kGdnChunk + j]);
  }
  return all;
}

TEST(GdnChunk, EveryIntermediateHasTheGpusBits) {
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::decay, 1), Gpu().decay), 0);
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::gram, kGdnChunk, 0), LowerTriangle(Gpu().gram, 0)), 0);
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::inverse, kGdnChunk), Gpu().inverse), 0);
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::u, kShape.value_dim), Gpu().u), 0);
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::w, kShape.key_dim), Gpu().w), 0);
  std::vector<uint16_t> delta;
  for (const float value : Gather(Ours(), &GdnChunk::delta, kShape.value_dim)) delta.push_back(F32ToBf16(value));
  EXPECT_EQ(Differing(delta, Gpu().delta), 0);
  EXPECT_EQ(Differing(Gather(Ours(), &GdnChunk::o, kShape.value_dim), Gpu().o), 0);
  EXPECT_EQ(Differing(Ours().states[2], Gpu().state2), 0);
}

TEST(GdnChunk, ACLibrarysExp2IsNotEnough) {
  const ChunkRun run = RunRecording([](float x) { return static_cast<float>(std::exp2(static_cast<double>(x))); });
  EXPECT_GT(Differing(Gather(run, &GdnChunk::gram, kGdnChunk, 0), LowerTriangle(Gpu().gram, 0)), 500);
  EXPECT_GT(Differing(run.states[2], Gpu().state2), 20);
}

TEST(GdnMutants, RunningSumOfTheDecay) {
  int differing = 0;
  float sum = 0.0f;
  for (int t = 0; t < kRows; ++t) {
    sum = t % kGdnChunk == 0 ? Gpu().g[t] : sum + Gpu().g[t];
    differing += !SameBits(sum * 1.4426950408889634f, Gpu().decay[t]);
  }
  EXPECT_GT(differing, 30);
}

// Row i of a recorded matrix of the first chunk.
const float* RowOf(const std::vector<float>& matrix, int i) {
  return &matrix[i * kGdnChunk];
}

// Block rows of the inverse below the diagonal, with each product's grouping given; from the recorded A and diagonal.
int DifferingMerges(bool first_even_odd, bool second_even_odd) {
  auto chain = [](bool even_odd, const auto& a, const auto& b) {
    std::vector<Factor> fa(16), fb(16);
    for (int k = 0; k < 16; ++k) {
      fa[k] = MakeTf32Factor(a(even_odd ? EvenThenOdd(k) : k));
      fb[k] = MakeTf32Factor(b(even_odd ? EvenThenOdd(k) : k));
    }
    return Chain(0.0f, fa, fb, kTf32Group);
  };
  const std::vector<float>& a = Gpu().gram;
  const std::vector<float>& t = Gpu().inverse;
  int differing = 0;
  for (int r = 16; r < kGdnChunk; r += 16) {
    for (int i = r; i < r + 16; ++i) {
      float product[16];
      for (int j = 0; j < 16; ++j) {
        product[j] = chain(
            first_even_odd, [&](int k) { return RowOf(t, i)[r + k]; },
            [&](int k) { return RowOf(a, r + k)[r - 16 + j]; });
      }
      for (int j = 0; j < 16; ++j) {
        const float merged = -chain(
            second_even_odd, [&](int k) { return product[k]; },
            [&](int k) { return RowOf(t, r - 16 + k)[r - 16 + j]; });
        differing += !SameBits(merged, RowOf(t, i)[r - 16 + j]);
      }
    }
  }
  return differing;
}

TEST(GdnMutants, GroupsOfTheMerges) {
  EXPECT_EQ(DifferingMerges(true, false), 0);
  EXPECT_GT(DifferingMerges(false, true), 100);
  EXPECT_GT(DifferingMerges(true, true), 100);
}

// The inverse of the first diagonal block by `sum` over the products a[c] * above[c], c < 16.
int DifferingDiagonal(const std::function<float(const float* a, const float* above)>& sum) {
  int differing = 0;
  for (int i = 2; i < 16; ++i) {
    for (int x = 0; x < i; ++x) {
      float a[16] = {}, above[16] = {};
      for (int c = 0; c < i; ++c) {
        a[c] = -RowOf(Gpu().gram, i)[c];
        above[c] = c > x ? RowOf(Gpu().inverse, c)[x] : 0.0f;
      }
      differing += !SameBits(a[x] + sum(a, above), RowOf(Gpu().inverse, i)[x]);
    }
  }
  return differing;
}

float TreeOfEight(float* p) {
  for (int distance = 4; distance >= 1; distance /= 2) {
    for (int c = 0; c < distance; ++c) p[c] += p[c + distance];
  }
  return p[0];
}

TEST(GdnMutants, OrderInTheDiagonalBlocks) {
  auto by_pairs = [](auto pair) {
    return [pair](const float* a, const float* above) {
      float p[8];
      for (int c = 0; c < 8; ++c) p[c] = pair(a[c], above[c], a[c + 8], above[c + 8]);
      return TreeOfEight(p);
    };
  };
  EXPECT_EQ(DifferingDiagonal(by_pairs([](float a, float x, float b, float y) { return std::fma(a, x, b * y); })), 0);
  EXPECT_GT(DifferingDiagonal(by_pairs([](float a, float x, float b, float y) { return std::fma(b, y, a * x); })), 0);
  EXPECT_GT(DifferingDiagonal(by_pairs([](float a, float x, float b, float y) { return a * x + b * y; })), 0);
  EXPECT_GT(DifferingDiagonal([](const float* a, const float* above) {
              float sum = 0.0f;
              for (int c = 0; c < 16; ++c) sum = std::fma(a[c], above[c], sum);
              return sum;
            }),
            10);
}

TEST(GdnMutants, RoundingsOfW) {
  // From the recorded inverse, first chunk: beta k rounded before its decay, or only after.
  int twice = 0, once = 0;
  for (int x = 0; x < kShape.key_dim; ++x) {
    auto column = [&](bool round) {
      return FactorMatrix::Of(1, kGdnChunk, [&](int, int j) {
        const float scaled = Bf16ToF32(Gpu().k[j * kShape.key_dim + x]) * Gpu().beta[j];
        return RoundBf16((round ? RoundBf16(scaled) : scaled) * Exp2Approx(Gpu().decay[j]));
      });
    };
    const FactorMatrix rounded = column(true), unrounded = column(false);
    for (int i = 0; i < kGdnChunk; ++i) {
      const FactorMatrix t =
          FactorMatrix::Of(1, kGdnChunk, [&](int, int j) { return RoundBf16(RowOf(Gpu().inverse, i)[j]); });
      const uint16_t want = Gpu().w[i * kShape.key_dim + x];
      twice += F32ToBf16(Chain(0.0f, t.Row(0), rounded.Row(0))) != want;
      once += F32ToBf16(Chain(0.0f, t.Row(0), unrounded.Row(0))) != want;
    }
  }
  EXPECT_EQ(twice, 0);
  EXPECT_GT(once, 500);
}

TEST(GdnMutants, TheStateTakesTheUnroundedDelta) {
  // The second state from the first one and the second chunk's rows.
  const GdnChunk& chunk = Ours().chunks[1];
  const float last = chunk.decay[kGdnChunk - 1];
  int unrounded = 0, rounded = 0, added_after = 0;
  for (int d = 0; d < kShape.value_dim; d += 5) {
    auto values = [&](bool round) {
      return FactorMatrix::Of(1, kGdnChunk, [&](int, int j) {
        const float delta = chunk.delta[j * kShape.value_dim + d];
        return RoundBf16((round ? RoundBf16(delta) : delta) * Exp2Approx(last - chunk.decay[j]));
      });
    };
    const FactorMatrix from_fp32 = values(false), from_bf16 = values(true);
    for (int x = 0; x < kShape.key_dim; ++x) {
      const FactorMatrix keys = FactorMatrix::Of(
          1, kGdnChunk, [&](int, int j) { return Bf16ToF32(Gpu().k[(kGdnChunk + j) * kShape.key_dim + x]); });
      const int at = x * kShape.value_dim + d;
      const float start = Ours().states[1][at] * Exp2Approx(last);
      unrounded += !SameBits(Chain(start, keys.Row(0), from_fp32.Row(0)), Gpu().state2[at]);
      rounded += !SameBits(Chain(start, keys.Row(0), from_bf16.Row(0)), Gpu().state2[at]);
      added_after += !SameBits(start + Chain(0.0f, keys.Row(0), from_fp32.Row(0)), Gpu().state2[at]);
    }
  }
  EXPECT_EQ(unrounded, 0);
  EXPECT_GT(rounded, 3000);
  EXPECT_GT(added_after, 1000);
}

// A small sequence of random rows.
struct RandomSequence {
  RandomSequence(int rows, int key_heads, int value_heads, GdnHeadShape head) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<uint16_t>& values, int count, float scale) {
      for (int i = 0; i < count; ++i) values.push_back(F32ToBf16(normal(random) * scale));
    };
    fill(q, rows * key_heads * head.key_dim, 1.0f / std::sqrt(static_cast<float>(head.key_dim)));
    fill(k, rows * key_heads * head.key_dim, 1.0f / std::sqrt(static_cast<float>(head.key_dim)));
    fill(v, rows * value_heads * head.value_dim, 1.0f);
    for (int i = 0; i < rows * value_heads; ++i) {
      g.push_back(-0.3f * std::abs(normal(random)));
      beta.push_back(F32ToBf16(1.0f + 0.3f * std::tanh(normal(random))));
    }
    sequence = {.rows = rows,
                .key_heads = key_heads,
                .value_heads = value_heads,
                .head = head,
                .q = q.data(),
                .k = k.data(),
                .v = v.data(),
                .g = g.data(),
                .beta = beta.data()};
  }

  std::vector<uint16_t> q, k, v, beta;
  std::vector<float> g;
  GdnSequence sequence;
};

TEST(GdnForward, HeadsAndChunksAreTheirOwn) {
  constexpr GdnHeadShape kSmall = {.key_dim = 32, .value_dim = 48};
  const RandomSequence random(150, 2, 6, kSmall);
  const GdnSequence& s = random.sequence;
  const int state_size = kSmall.key_dim * kSmall.value_dim;
  std::vector<float> state(6 * state_size, 0.0f);
  std::vector<uint16_t> o(150 * 6 * kSmall.value_dim);
  GdnForward(s, state.data(), o.data());

  // The same in two pieces, the second from the handed-over state.
  std::vector<float> carried(6 * state_size, 0.0f);
  std::vector<uint16_t> pieces(o.size());
  for (int begin : {0, 64}) {
    GdnSequence piece = s;
    piece.rows = begin == 0 ? 64 : 86;
    piece.q += begin * 2 * kSmall.key_dim;
    piece.k += begin * 2 * kSmall.key_dim;
    piece.v += begin * 6 * kSmall.value_dim;
    piece.g += begin * 6;
    piece.beta += begin * 6;
    GdnForward(piece, carried.data(), &pieces[begin * 6 * kSmall.value_dim]);
  }
  EXPECT_EQ(Differing(pieces, o), 0);
  EXPECT_EQ(Differing(carried, state), 0);

  // Value head 4 alone, which reads key head 1.
  std::vector<float> head_state(state_size, 0.0f);
  std::vector<uint16_t> head_o, want_o;
  for (int begin = 0; begin < 150; begin += kGdnChunk) {
    GdnChunk chunk(kSmall, head_state.data(), static_cast<float>(1.0 / std::sqrt(32.0)));
    for (int t = begin; t < std::min(150, begin + kGdnChunk); ++t) {
      chunk.Append({.q = s.q + (t * 2 + 1) * kSmall.key_dim,
                    .k = s.k + (t * 2 + 1) * kSmall.key_dim,
                    .v = s.v + (t * 6 + 4) * kSmall.value_dim,
                    .g = s.g[t * 6 + 4],
                    .beta = s.beta[t * 6 + 4]});
      for (int d = 0; d < kSmall.value_dim; ++d) {
        head_o.push_back(chunk.o[(t - begin) * kSmall.value_dim + d]);
        want_o.push_back(o[(t * 6 + 4) * kSmall.value_dim + d]);
      }
    }
    if (chunk.rows() == kGdnChunk) head_state = chunk.NextState();
  }
  EXPECT_EQ(Differing(head_o, want_o), 0);
  EXPECT_EQ(Differing(head_state, std::vector<float>(&state[4 * state_size], &state[5 * state_size])), 0);
}

// Against the recurrence that the chunk program stands for, in fp64: the whole is the right function.
TEST(GdnForward, IsTheGatedDeltaRule) {
  constexpr GdnHeadShape kSmall = {.key_dim = 16, .value_dim = 32};
  const RandomSequence random(100, 1, 1, kSmall);
  std::vector<float> state(kSmall.key_dim * kSmall.value_dim, 0.0f);
  std::vector<uint16_t> o(100 * kSmall.value_dim);
  GdnForward(random.sequence, state.data(), o.data());

  std::vector<double> s(state.size(), 0.0);
  double error = 0.0, norm = 0.0;
  for (int t = 0; t < 100; ++t) {
    auto k = [&](int x) { return static_cast<double>(Bf16ToF32(random.k[t * kSmall.key_dim + x])); };
    auto q = [&](int x) { return static_cast<double>(Bf16ToF32(random.q[t * kSmall.key_dim + x])); };
    for (int d = 0; d < kSmall.value_dim; ++d) {
      double carried = 0.0, out = 0.0;
      for (int x = 0; x < kSmall.key_dim; ++x) {
        double& element = s[x * kSmall.value_dim + d];
        element *= std::exp(static_cast<double>(random.g[t]));
        carried += k(x) * element;
      }
      const double delta =
          Bf16ToF32(random.beta[t]) * (static_cast<double>(Bf16ToF32(random.v[t * kSmall.value_dim + d])) - carried);
      for (int x = 0; x < kSmall.key_dim; ++x) {
        s[x * kSmall.value_dim + d] += k(x) * delta;
        out += q(x) * s[x * kSmall.value_dim + d];
      }
      out /= std::sqrt(static_cast<double>(kSmall.key_dim));
      error += std::pow(out - Bf16ToF32(o[t * kSmall.value_dim + d]), 2);
      norm += out * out;
    }
  }
  // Several bf16 roundings of 2^-9 each on the way.
  EXPECT_LT(std::sqrt(error / norm), 4 * 0x1p-9);
}

}  // namespace
}  // namespace lockstep::oracle

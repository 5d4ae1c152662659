#include "kernels/cpu/gdn_chunk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/sequence_test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::Matrix;
using testing::RandomSchedule;
using testing::RunSchedule;
using testing::Schedule;
using testing::SequenceInputs;
using testing::TestContext;
using testing::TokenSchedule;
using testing::WholeSchedule;

// Operands: qkv, beta, g.
enum class Gates { kUsual, kNoDecay, kHardDecay };

SequenceInputs MakeInputs(const GdnShape& shape, const std::vector<int64_t>& lengths, bool bf16, uint32_t seed,
                          Gates gates = Gates::kUsual) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  SequenceInputs inputs(3);
  for (int64_t length : lengths) {
    Matrix qkv(length, shape.conv_channels());
    qkv.Fill(rng(), bf16);
    Matrix beta(length, shape.value_heads);
    Matrix g(length, shape.value_heads);
    for (int64_t r = 0; r < length; ++r) {
      for (int64_t h = 0; h < shape.value_heads; ++h) {
        const float b = 2.0f * uniform(rng);
        beta.row(r)[h] = gates == Gates::kNoDecay ? 2.0f : (bf16 ? RoundBf16(b) : b);
        g.row(r)[h] = gates == Gates::kNoDecay
                          ? 0.0f
                          : (gates == Gates::kHardDecay && r % 3 == 1 ? -50.0f : -0.3f * uniform(rng));
      }
      // Now and then a key of zeros, whose norm is 0.
      if (r % 37 == 5) std::fill_n(qkv.row(r) + shape.key_width(), shape.key_width(), 0.0f);
    }
    inputs[0].push_back(std::move(qkv));
    inputs[1].push_back(std::move(beta));
    inputs[2].push_back(std::move(g));
  }
  return inputs;
}

// State slots of some sequences, poisoned before the reset.
class Slots {
 public:
  Slots(const CpuContext& ctx, const GdnShape& shape, size_t count) : bytes_(CpuGdnStateBytes(ctx, shape)) {
    for (size_t i = 0; i < count; ++i) {
      buffers_.emplace_back(bytes_);
      std::memset(buffers_[i].data(), 0xFF, bytes_);
      CpuGdnResetState(ctx, shape, buffers_[i].data());
    }
  }
  std::byte* operator[](int64_t i) { return buffers_[i].data(); }
  int64_t bytes() const { return bytes_; }
  // Moves sequence i to fresh memory, and poisons the old.
  void Move(int64_t i) {
    AlignedBuffer fresh(bytes_);
    std::memcpy(fresh.data(), buffers_[i].data(), bytes_);
    std::memset(buffers_[i].data(), 0xFF, bytes_);
    buffers_[i] = std::move(fresh);
  }

 private:
  int64_t bytes_;
  std::vector<AlignedBuffer> buffers_;
};

std::vector<Matrix> RunChunk(const std::string& profile, const GdnShape& shape, const std::vector<int64_t>& lengths,
                             SequenceInputs& inputs, const Schedule& schedule, int threads, bool move_slots = false) {
  TestContext context(profile, threads);
  Slots slots(context.get(), shape, lengths.size());
  return RunSchedule(
      schedule, lengths, inputs, shape.value_width(),
      [&](std::vector<Piece>& pieces, const std::vector<int64_t>& sequences, std::vector<Matrix>& in, Matrix& out) {
        for (size_t p = 0; p < pieces.size(); ++p) {
          if (move_slots) slots.Move(sequences[p]);
          pieces[p].gdn_state = slots[sequences[p]];
        }
        CpuGdnChunk(context.get(), in[0].view(), in[1].view(), in[2].view(), shape, pieces, out.view());
      });
}

// One sequence by the plain recurrence in fp64: S = e^g S; delta = beta (v - k S); S += k delta; o = q S. `magnitude`
// gets, per row and head, the largest sum of |terms| that any output or v' of the rows so far was made of.
Matrix Recurrence(const GdnShape& shape, Matrix& qkv, Matrix& beta, Matrix& g,
                  std::vector<std::vector<double>>* magnitude) {
  const int64_t dk = shape.key_dim;
  const int64_t dv = shape.value_dim;
  Matrix out(qkv.rows(), shape.value_width());
  magnitude->assign(qkv.rows(), std::vector<double>(shape.value_heads));
  for (int64_t h = 0; h < shape.value_heads; ++h) {
    const int64_t key_head = h / (shape.value_heads / shape.key_heads);
    std::vector<double> state(dk * dv, 0.0);
    double largest = 0.0;
    for (int64_t t = 0; t < qkv.rows(); ++t) {
      const float* q_in = qkv.row(t) + key_head * dk;
      const float* k_in = q_in + shape.key_width();
      const float* v = qkv.row(t) + 2 * shape.key_width() + h * dv;
      double qq = 1e-6;
      double kk = 1e-6;
      for (int64_t d = 0; d < dk; ++d) {
        qq += static_cast<double>(q_in[d]) * q_in[d];
        kk += static_cast<double>(k_in[d]) * k_in[d];
      }
      const double q_factor = 1.0 / std::sqrt(qq * static_cast<double>(dk));
      const double k_factor = 1.0 / std::sqrt(kk);
      const double decay = std::exp(static_cast<double>(g.row(t)[h]));
      const double b = beta.row(t)[h];
      for (double& s : state) s *= decay;
      for (int64_t c = 0; c < dv; ++c) {
        double ks = 0.0;
        double terms = std::abs(v[c]);
        for (int64_t d = 0; d < dk; ++d) {
          ks += k_in[d] * k_factor * state[d * dv + c];
          terms += std::abs(k_in[d] * k_factor * state[d * dv + c]);
        }
        const double delta = b * (v[c] - ks);
        double o = 0.0;
        double o_terms = 0.0;
        for (int64_t d = 0; d < dk; ++d) {
          state[d * dv + c] += k_in[d] * k_factor * delta;
          o += q_in[d] * q_factor * state[d * dv + c];
          o_terms += std::abs(q_in[d] * q_factor * state[d * dv + c]);
        }
        out.row(t)[h * dv + c] = static_cast<float>(o);
        largest = std::max({largest, b * terms / std::sqrt(static_cast<double>(dk)), o_terms});
      }
      (*magnitude)[t][h] = largest;
    }
  }
  return out;
}

// A chain of n products has an error below n * 2^-24 times the sum of its terms' magnitudes. A row goes through chains
// over d_k (k S, q S) and over at most 64 rows (the solve, the output), and what earlier rows got wrong passes on
// through I - beta k k^T, whose norm is at most 1: four such chains, on the largest sum of magnitudes so far. In bf16
// the output's own rounding, 2^-8 of it, comes on top.
void ExpectNearRecurrence(const GdnShape& shape, Matrix& got, Matrix& want,
                          const std::vector<std::vector<double>>& magnitude, bool bf16) {
  double worst = 0.0;
  for (int64_t t = 0; t < got.rows(); ++t) {
    for (int64_t c = 0; c < shape.value_width(); ++c) {
      const double bound =
          std::ldexp(4.0 * static_cast<double>(shape.key_dim + kGdnChunk), -24) * magnitude[t][c / shape.value_dim] +
          (bf16 ? std::ldexp(std::abs(want.row(t)[c]), -8) : 0.0) + 1e-12;
      const double error = std::abs(static_cast<double>(got.row(t)[c]) - want.row(t)[c]);
      // Not EXPECT_LE: a NaN must fail.
      ASSERT_TRUE(error <= bound) << "row " << t << " column " << c << ": " << got.row(t)[c] << ", want "
                                  << want.row(t)[c] << " within " << bound;
      worst = std::max(worst, error / bound);
    }
  }
  ::testing::Test::RecordProperty("worst_share_of_bound", std::to_string(worst));
}

struct ShapeCase {
  GdnShape shape;
  const char* name;
};

const ShapeCase kShapes[] = {
    {{.key_heads = 2, .value_heads = 2, .key_dim = 96, .value_dim = 192}, "d96x192"},
    {{.key_heads = 1, .value_heads = 3, .key_dim = 32, .value_dim = 64}, "d32x64_three_value_heads"},
    {{.key_heads = 2, .value_heads = 4, .key_dim = 16, .value_dim = 16}, "d16x16_two_value_heads"},
    {{.key_heads = 1, .value_heads = 2, .key_dim = 24, .value_dim = 40}, "d24x40"},
    {{.key_heads = 1, .value_heads = 1, .key_dim = 40, .value_dim = 24}, "d40x24"},
    {{.key_heads = 1, .value_heads = 1, .key_dim = 128, .value_dim = 128}, "d128x128"},
};

const std::vector<int64_t> kLengths = {1, 15, 16, 17, 63, 64, 65, 128, 300};

class GdnChunkTest : public ::testing::TestWithParam<ShapeCase> {};

TEST_P(GdnChunkTest, Fp32ProgramIsTheRecurrence) {
  const GdnShape& shape = GetParam().shape;
  for (const char* profile : {"fp32", "hf-torch"}) {
    const bool bf16 = TestContext(profile).bf16();
    SequenceInputs inputs = MakeInputs(shape, kLengths, bf16, 1);
    std::vector<Matrix> out = RunChunk(profile, shape, kLengths, inputs, WholeSchedule(kLengths), 2);
    for (size_t i = 0; i < kLengths.size(); ++i) {
      std::vector<std::vector<double>> magnitude;
      Matrix want = Recurrence(shape, inputs[0][i], inputs[1][i], inputs[2][i], &magnitude);
      ExpectNearRecurrence(shape, out[i], want, magnitude, bf16);
    }
  }
}

// With no decay and beta = 2 every transition is a reflection: nothing is ever forgotten, errors included. With g = -50
// the state dies between rows.
TEST_P(GdnChunkTest, ExtremeGates) {
  const GdnShape& shape = GetParam().shape;
  const std::vector<int64_t> lengths = {200};
  for (const Gates gates : {Gates::kNoDecay, Gates::kHardDecay}) {
    SequenceInputs inputs = MakeInputs(shape, lengths, /*bf16=*/false, 2, gates);
    std::vector<std::vector<double>> magnitude;
    Matrix want = Recurrence(shape, inputs[0][0], inputs[1][0], inputs[2][0], &magnitude);
    std::vector<Matrix> out = RunChunk("fp32", shape, lengths, inputs, RandomSchedule(lengths, 70, 3), 1);
    ExpectNearRecurrence(shape, out[0], want, magnitude, false);
  }
}

// The bf16 program rounds q and k, T, both products into u and w, u, w, v', the state's image, P and the output: ten
// roundings, each of a relative error spread over [-2^-8, 2^-8], which is 2^-8 / sqrt(3) in the mean square at most.
// They are independent, so of the norm: sqrt(10) times that.
TEST_P(GdnChunkTest, Bf16ProgramIsNearTheRecurrence) {
  const GdnShape& shape = GetParam().shape;
  SequenceInputs inputs = MakeInputs(shape, kLengths, /*bf16=*/true, 4);
  std::vector<Matrix> out = RunChunk("hf", shape, kLengths, inputs, WholeSchedule(kLengths), 2);
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < kLengths.size(); ++i) {
    std::vector<std::vector<double>> magnitude;
    Matrix want = Recurrence(shape, inputs[0][i], inputs[1][i], inputs[2][i], &magnitude);
    for (int64_t t = 0; t < kLengths[i]; ++t) {
      for (int64_t c = 0; c < shape.value_width(); ++c) {
        error += std::pow(static_cast<double>(out[i].at(t, c)) - want.at(t, c), 2);
        norm += std::pow(want.at(t, c), 2);
      }
    }
  }
  const double relative = std::sqrt(error / norm);
  EXPECT_TRUE(relative <= std::sqrt(10.0 / 3.0) * testing::kUnitBf16) << relative;
}

TEST_P(GdnChunkTest, NoScheduleShowsInTheBits) {
  const GdnShape& shape = GetParam().shape;
  for (const char* profile : {"fp32", "hf-torch", "hf"}) {
    SequenceInputs inputs = MakeInputs(shape, kLengths, TestContext(profile).bf16(), 5);
    std::vector<Matrix> want = RunChunk(profile, shape, kLengths, inputs, WholeSchedule(kLengths), 1);
    const auto check = [&](const char* what, const Schedule& schedule, int threads, bool move_slots) {
      std::vector<Matrix> got = RunChunk(profile, shape, kLengths, inputs, schedule, threads, move_slots);
      EXPECT_EQ(DifferingRows(got, want), 0) << profile << ", " << what;
    };
    check("token by token", TokenSchedule(kLengths), 1, false);
    check("token by token, slots moved", TokenSchedule(kLengths), 2, true);
    check("whole, two threads", WholeSchedule(kLengths), 2, false);
    for (uint32_t seed = 0; seed < 4; ++seed)
      check("random pieces", RandomSchedule(kLengths, seed % 2 == 0 ? 20 : 150, seed), 3, seed == 1);
  }
}

TEST_P(GdnChunkTest, NoInstructionSetShowsInTheBits) {
  const GdnShape& shape = GetParam().shape;
  const std::vector<int64_t> lengths = {130, 67};
  for (const char* profile : {"fp32", "hf-torch", "hf"}) {
    SequenceInputs inputs = MakeInputs(shape, lengths, TestContext(profile).bf16(), 6);
    std::vector<Matrix> want = RunChunk(profile, shape, lengths, inputs, WholeSchedule(lengths), 1);
    ForEachTarget([&] {
      for (const Schedule& schedule : {WholeSchedule(lengths), RandomSchedule(lengths, 9, 8)}) {
        std::vector<Matrix> got = RunChunk(profile, shape, lengths, inputs, schedule, 1);
        EXPECT_EQ(DifferingRows(got, want), 0) << profile;
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, GdnChunkTest, ::testing::ValuesIn(kShapes),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

TEST(GdnChunkLong, ThousandTokens) {
  const GdnShape shape = {.key_heads = 1, .value_heads = 1, .key_dim = 96, .value_dim = 192};
  const std::vector<int64_t> lengths = {1000};
  SequenceInputs inputs = MakeInputs(shape, lengths, /*bf16=*/false, 9);
  std::vector<std::vector<double>> magnitude;
  Matrix want = Recurrence(shape, inputs[0][0], inputs[1][0], inputs[2][0], &magnitude);
  std::vector<Matrix> whole = RunChunk("fp32", shape, lengths, inputs, WholeSchedule(lengths), 1);
  ExpectNearRecurrence(shape, whole[0], want, magnitude, false);
  std::vector<Matrix> pieces = RunChunk("fp32", shape, lengths, inputs, RandomSchedule(lengths, 100, 10), 2);
  EXPECT_EQ(DifferingRows(whole, pieces), 0);
}

// A slot copied in the middle of a chunk and run twice, with different rows after the fork: each half goes on as if it
// were alone.
TEST(GdnChunkFork, CopiedSlotGoesOnIdentically) {
  const GdnShape shape = {.key_heads = 1, .value_heads = 2, .key_dim = 32, .value_dim = 64};
  const std::vector<int64_t> lengths = {100, 100};
  constexpr int64_t kFork = 75;
  for (const char* profile : {"fp32", "hf-torch", "hf"}) {
    TestContext context(profile);
    SequenceInputs inputs = MakeInputs(shape, lengths, context.bf16(), 11);
    // Sequence 1 has sequence 0's first rows.
    for (std::vector<Matrix>& operand : inputs) {
      for (int64_t r = 0; r < kFork; ++r) std::copy_n(operand[0].row(r), operand[0].width(), operand[1].row(r));
    }
    std::vector<Matrix> want = RunChunk(profile, shape, lengths, inputs, WholeSchedule(lengths), 1);
    Slots slots(context.get(), shape, 2);
    std::vector<Matrix> out = {Matrix(100, shape.value_width()), Matrix(100, shape.value_width())};
    const auto run = [&](int64_t sequence, int64_t begin, int64_t count) {
      const Piece piece = {.row_begin = begin, .row_count = count, .position = begin, .gdn_state = slots[sequence]};
      CpuGdnChunk(context.get(), inputs[0][sequence].view(), inputs[1][sequence].view(), inputs[2][sequence].view(),
                  shape, {&piece, 1}, out[sequence].view());
    };
    run(0, 0, kFork);
    std::memcpy(slots[1], slots[0], slots.bytes());
    run(0, kFork, 25);
    run(1, kFork, 25);
    EXPECT_EQ(DifferingRows(out[0], 0, want[0], 0, 100), 0) << profile;
    EXPECT_EQ(DifferingRows(out[1], kFork, want[1], kFork, 25), 0) << profile;
  }
}

// A slot used before and reset is a new one.
TEST(GdnChunkState, ResetForgets) {
  const GdnShape shape = {.key_heads = 1, .value_heads = 1, .key_dim = 32, .value_dim = 64};
  const std::vector<int64_t> lengths = {100, 80};
  for (const char* profile : {"fp32", "hf-torch", "hf"}) {
    TestContext context(profile);
    SequenceInputs inputs = MakeInputs(shape, lengths, context.bf16(), 13);
    std::vector<Matrix> want = RunChunk(profile, shape, lengths, inputs, WholeSchedule(lengths), 1);
    Slots slots(context.get(), shape, 1);
    for (int64_t sequence = 0; sequence < 2; ++sequence) {
      CpuGdnResetState(context.get(), shape, slots[0]);
      Matrix out(lengths[sequence], shape.value_width());
      const Piece piece = {.row_begin = 0, .row_count = lengths[sequence], .position = 0, .gdn_state = slots[0]};
      CpuGdnChunk(context.get(), inputs[0][sequence].view(), inputs[1][sequence].view(), inputs[2][sequence].view(),
                  shape, {&piece, 1}, out.view());
      EXPECT_EQ(DifferingRows(out, 0, want[sequence], 0, lengths[sequence]), 0) << profile;
    }
  }
}

TEST(GdnChunkState, BytesAreAsDocumented) {
  const GdnShape one = {.key_heads = 1, .value_heads = 1, .key_dim = 96, .value_dim = 192};
  const NumericsProfile fp32 = FindNumericsProfile("fp32").value();
  const NumericsProfile hf = FindNumericsProfile("hf").value();
  EXPECT_EQ(GdnStateLayout(fp32, one).key_head_bytes, 24832);
  EXPECT_EQ(GdnStateLayout(FindNumericsProfile("hf-torch").value(), one).key_head_bytes, 12544);
  EXPECT_EQ(GdnStateLayout(fp32, one).value_head_bytes, 196928);
  EXPECT_EQ(GdnStateLayout(hf, one).key_head_bytes, 12288);
  EXPECT_EQ(GdnStateLayout(hf, one).value_head_bytes, 237824);
  for (const ShapeCase& c : kShapes) EXPECT_EQ(GdnStateLayout(hf, c.shape).bytes % 64, 0);
}

TEST(GdnChunkDeathTest, PieceMustContinueItsState) {
  testing::LogToStderr();
  const GdnShape shape = {.key_heads = 1, .value_heads = 1, .key_dim = 16, .value_dim = 16};
  TestContext context("fp32");
  SequenceInputs inputs = MakeInputs(shape, {4}, /*bf16=*/false, 12);
  Slots slots(context.get(), shape, 1);
  Matrix out(4, 16);
  const Piece piece = {.row_begin = 0, .row_count = 2, .position = 2, .gdn_state = slots[0]};
  EXPECT_DEATH(CpuGdnChunk(context.get(), inputs[0][0].view(), inputs[1][0].view(), inputs[2][0].view(), shape,
                           {&piece, 1}, out.view()),
               "piece at position 2, its state has seen 0 tokens");
}

}  // namespace
}  // namespace lockstep

// Attention and the KV cache together: what WriteKv stores, Attention reads.
#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kv_cache.h"
#include "kernels/cpu/sequence_test_util.h"

namespace lockstep {
namespace {

using testing::ForEachTarget;
using testing::Matrix;
using testing::RandomSchedule;
using testing::RunSchedule;
using testing::Schedule;
using testing::SequenceInputs;
using testing::TokenSchedule;
using testing::WholeSchedule;

using testing::DifferingRows;

AttentionShape Shape(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window = 0) {
  return {.heads = heads,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .window = window,
          .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)))};
}

NumericsProfile ProfileWith(const std::string& name, AttentionProgram program) {
  NumericsProfile profile = FindNumericsProfile(name).value();
  profile.attention = profile.sliding_attention = program;
  return profile;
}

// Operands: q, k, v.
SequenceInputs MakeInputs(const AttentionShape& shape, const std::vector<int64_t>& lengths, bool bf16, uint32_t seed) {
  SequenceInputs inputs(3);
  for (const int64_t length : lengths) {
    inputs[0].emplace_back(length, shape.heads * shape.head_dim).Fill(seed++, bf16, 2.0f);
    inputs[1].emplace_back(length, shape.kv_heads * shape.head_dim).Fill(seed++, bf16);
    inputs[2].emplace_back(length, shape.kv_heads * shape.head_dim).Fill(seed++, bf16);
  }
  return inputs;
}

// Pages full of NaN, dealt out in random order; a sequence's table has its pages and, behind them, an id far outside.
class Pages {
 public:
  Pages(const CpuContext& ctx, const AttentionShape& shape, int64_t page_size, const std::vector<int64_t>& lengths)
      : page_size_(page_size), page_bytes_(CpuKvPageBytes(ctx, shape, page_size)), tables_(lengths.size()) {
    EXPECT_EQ(page_bytes_ % 64, 0);
    std::vector<int32_t> ids;
    for (const int64_t length : lengths) ids.resize(ids.size() + (length + page_size - 1) / page_size);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    std::mt19937 rng(5);
    std::shuffle(ids.begin(), ids.end(), rng);
    memory_ = AlignedBuffer(static_cast<int64_t>(ids.size()) * page_bytes_);
    std::memset(memory_.data(), 0xFF, memory_.bytes());
    size_t next = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t p = 0; p < (lengths[s] + page_size - 1) / page_size; ++p) tables_[s].push_back(ids[next++]);
      tables_[s].resize(tables_[s].size() + 8, std::numeric_limits<int32_t>::max());
    }
  }
  KvLayer layer() { return {.base = memory_.data(), .page_size = page_size_}; }
  const int32_t* table(int64_t sequence) const { return tables_[sequence].data(); }

 private:
  int64_t page_size_;
  int64_t page_bytes_;
  AlignedBuffer memory_;
  std::vector<std::vector<int32_t>> tables_;
};

std::vector<Matrix> RunAttention(const NumericsProfile& profile, const AttentionShape& shape,
                                 const std::vector<int64_t>& lengths, SequenceInputs& inputs, const Schedule& schedule,
                                 int64_t page_size, int threads) {
  ThreadPool pool(threads);
  ThreadScratch scratch(threads);
  const CpuContext ctx = {profile, pool, scratch};
  Pages pages(ctx, shape, page_size, lengths);
  return RunSchedule(
      schedule, lengths, inputs, shape.heads * shape.head_dim,
      [&](std::vector<Piece>& pieces, const std::vector<int64_t>& sequences, std::vector<Matrix>& in, Matrix& out) {
        for (size_t p = 0; p < pieces.size(); ++p) pieces[p].page_table = pages.table(sequences[p]);
        CpuWriteKv(ctx, in[1].view(), in[2].view(), shape, pieces, pages.layer());
        CpuAttention(ctx, in[0].view(), shape, pieces, pages.layer(), out.view());
      });
}

// Softmax attention in fp64, against bounds of its own arithmetic. A score's chain errs by head_dim * 2^-24 * sum |q k|
// * scale, plus its rounding and exp's, and that is the relative error d of every p; o is a mean of v with weights p /
// l, so it moves by at most 2 d max |v|. Its own chain and the rescaling at each tile add (keys + 3 tiles) * 2^-24 *
// max |v|. bf16: p rounded (2^-8 max |v|), and the output (2^-8 |o|).
void ExpectNearFp64(const AttentionShape& shape, bool bf16, SequenceInputs& inputs, size_t sequence, Matrix& got) {
  const int64_t group = shape.heads / shape.kv_heads;
  const int64_t dim = shape.head_dim;
  for (int64_t t = 0; t < got.rows(); ++t) {
    const int64_t first = shape.window > 0 ? std::max<int64_t>(0, t - shape.window + 1) : 0;
    for (int64_t h = 0; h < shape.heads; ++h) {
      const float* q = inputs[0][sequence].row(t) + h * dim;
      std::vector<double> p(t + 1 - first);
      double top = -1e300;
      double worst_terms = 0.0;
      for (int64_t j = first; j <= t; ++j) {
        const float* k = inputs[1][sequence].row(j) + h / group * dim;
        double s = 0.0;
        double terms = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
          s += static_cast<double>(q[d]) * k[d];
          terms += std::abs(static_cast<double>(q[d]) * k[d]);
        }
        p[j - first] = s * shape.scale;
        top = std::max(top, p[j - first]);
        worst_terms = std::max(worst_terms, terms * shape.scale);
      }
      double sum = 0.0;
      for (double& x : p) sum += x = std::exp(x - top);
      const double d_relative = static_cast<double>(dim + 4) * testing::kUnitF32 * worst_terms + 4 * testing::kUnitF32;
      for (int64_t c = 0; c < dim; ++c) {
        double want = 0.0;
        double largest = 0.0;
        for (int64_t j = first; j <= t; ++j) {
          const double v = inputs[2][sequence].row(j)[h / group * dim + c];
          want += p[j - first] / sum * v;
          largest = std::max(largest, std::abs(v));
        }
        const double keys = static_cast<double>(t + 1 - first);
        double bound = largest * (2 * d_relative + (keys + 3 * (keys / 64 + 2)) * testing::kUnitF32);
        if (bf16) bound += testing::kUnitBf16 * (largest + std::abs(want));
        const double error = std::abs(got.at(t, h * dim + c) - want);
        ASSERT_TRUE(error <= bound) << "row " << t << " head " << h << " column " << c << ": " << got.at(t, h * dim + c)
                                    << ", want " << want;
      }
    }
  }
}

struct Case {
  AttentionShape shape;
  const char* name;
};

const Case kCases[] = {
    {Shape(4, 4, 128), "heads4_dim128"},    {Shape(6, 2, 64), "groups_of_3_dim64"},
    {Shape(8, 1, 16), "groups_of_8_dim16"}, {Shape(2, 1, 24), "groups_of_2_dim24"},
    {Shape(2, 2, 32, 1), "window1"},        {Shape(2, 1, 32, 5), "window5"},
    {Shape(2, 2, 40, 64), "window64"},      {Shape(4, 2, 32, 100), "window100"},
};

const std::vector<int64_t> kLengths = {1, 15, 16, 17, 63, 64, 65, 128, 300};
constexpr AttentionProgram kPrograms[] = {AttentionProgram::kTiles128Forward, AttentionProgram::kTiles64Backward,
                                          AttentionProgram::kTiles512Forward};

class AttentionTest : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionTest, MatchesFp64) {
  const AttentionShape& shape = GetParam().shape;
  for (const char* name : {"fp32", "hf", "hf-torch"}) {
    for (const AttentionProgram program : kPrograms) {
      const NumericsProfile profile = ProfileWith(name, program);
      const bool bf16 = profile.activations == DType::kBF16;
      SequenceInputs inputs = MakeInputs(shape, kLengths, bf16, 1);
      std::vector<Matrix> out = RunAttention(profile, shape, kLengths, inputs, WholeSchedule(kLengths), 32, 2);
      for (size_t i = 0; i < kLengths.size(); ++i) ExpectNearFp64(shape, bf16, inputs, i, out[i]);
    }
  }
}

TEST_P(AttentionTest, NeitherScheduleNorPageSizeShowsInTheBits) {
  const AttentionShape& shape = GetParam().shape;
  for (const char* name : {"fp32", "hf", "hf-torch"}) {
    for (const AttentionProgram program : kPrograms) {
      const NumericsProfile profile = ProfileWith(name, program);
      SequenceInputs inputs = MakeInputs(shape, kLengths, profile.activations == DType::kBF16, 2);
      std::vector<Matrix> want = RunAttention(profile, shape, kLengths, inputs, WholeSchedule(kLengths), 64, 1);
      const auto check = [&](const char* what, const Schedule& schedule, int64_t page_size, int threads) {
        std::vector<Matrix> got = RunAttention(profile, shape, kLengths, inputs, schedule, page_size, threads);
        EXPECT_EQ(DifferingRows(got, want), 0) << name << ", " << what << ", page size " << page_size;
      };
      check("token by token", TokenSchedule(kLengths), 16, 2);
      uint32_t seed = 0;
      for (const int64_t page_size : {16, 32, 48, 64, 128, 256}) {
        ++seed;
        check("random pieces", RandomSchedule(kLengths, seed % 2 == 0 ? 10 : 120, seed), page_size,
              1 + static_cast<int>(seed % 3));
      }
    }
  }
}

TEST_P(AttentionTest, NoInstructionSetShowsInTheBits) {
  const AttentionShape& shape = GetParam().shape;
  const std::vector<int64_t> lengths = {150, 40};
  for (const char* name : {"fp32", "hf", "hf-torch"}) {
    for (const AttentionProgram program : kPrograms) {
      const NumericsProfile profile = ProfileWith(name, program);
      SequenceInputs inputs = MakeInputs(shape, lengths, profile.activations == DType::kBF16, 3);
      std::vector<Matrix> want = RunAttention(profile, shape, lengths, inputs, WholeSchedule(lengths), 64, 1);
      ForEachTarget([&] {
        std::vector<Matrix> got = RunAttention(profile, shape, lengths, inputs, RandomSchedule(lengths, 30, 4), 32, 1);
        EXPECT_EQ(DifferingRows(got, want), 0) << name;
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionTest, ::testing::ValuesIn(kCases),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

// Scores from -300 to 300: most numerators vanish, and the maximum moves from tile to tile.
TEST(AttentionEdges, LargeScores) {
  const AttentionShape shape = Shape(2, 1, 64);
  const std::vector<int64_t> lengths = {400};
  for (const AttentionProgram program : kPrograms) {
    SequenceInputs inputs = MakeInputs(shape, lengths, false, 7);
    for (int64_t r = 0; r < 400; ++r) {
      for (int64_t c = 0; c < inputs[0][0].width(); ++c) inputs[0][0].row(r)[c] *= 40.0f;
    }
    const NumericsProfile profile = ProfileWith("fp32", program);
    std::vector<Matrix> out = RunAttention(profile, shape, lengths, inputs, RandomSchedule(lengths, 90, 8), 16, 2);
    ExpectNearFp64(shape, false, inputs, 0, out[0]);
  }
}

TEST(AttentionEdges, ThousandTokens) {
  const AttentionShape shape = Shape(2, 1, 64, 300);
  const std::vector<int64_t> lengths = {1000};
  for (const AttentionProgram program : kPrograms) {
    const NumericsProfile profile = ProfileWith("hf", program);
    SequenceInputs inputs = MakeInputs(shape, lengths, true, 9);
    std::vector<Matrix> whole = RunAttention(profile, shape, lengths, inputs, WholeSchedule(lengths), 16, 2);
    ExpectNearFp64(shape, true, inputs, 0, whole[0]);
    std::vector<Matrix> pieces =
        RunAttention(profile, shape, lengths, inputs, RandomSchedule(lengths, 200, 10), 128, 1);
    EXPECT_EQ(DifferingRows(whole, pieces), 0);
  }
}

// The two programs sum in different orders: a test that could not tell them apart would not see a wrong one either.
TEST(AttentionEdges, ProgramsDifferInBits) {
  const AttentionShape shape = Shape(2, 2, 64);
  const std::vector<int64_t> lengths = {300};
  SequenceInputs inputs = MakeInputs(shape, lengths, false, 11);
  std::vector<Matrix> forward =
      RunAttention(ProfileWith("fp32", kPrograms[0]), shape, lengths, inputs, WholeSchedule(lengths), 64, 1);
  std::vector<Matrix> backward =
      RunAttention(ProfileWith("fp32", kPrograms[1]), shape, lengths, inputs, WholeSchedule(lengths), 64, 1);
  EXPECT_GT(DifferingRows(forward, backward), 100);
  // One tile of 64 keys is the same thing in both.
  EXPECT_EQ(DifferingRows(forward[0], 0, backward[0], 0, 64), 0);
}

TEST(KvCache, PageBytes) {
  testing::TestContext hf("hf");
  testing::TestContext fp32("fp32");
  EXPECT_EQ(CpuKvPageBytes(hf.get(), Shape(4, 2, 128), 16), 2 * 2 * 16 * 128 * 2);
  EXPECT_EQ(CpuKvPageBytes(fp32.get(), Shape(4, 2, 128), 64), 2 * 2 * 64 * 128 * 4);
  // Values are padded to 32 columns.
  EXPECT_EQ(CpuKvPageBytes(hf.get(), Shape(1, 1, 24), 16), 16 * 24 * 2 + 16 * 32 * 2);
}

TEST(KvCacheDeathTest, PageSizeMustBeAMultipleOf16) {
  testing::LogToStderr();
  testing::TestContext context("hf");
  EXPECT_DEATH(CpuKvPageBytes(context.get(), Shape(1, 1, 16), 24), "page_size 24, want a multiple of 16");
}

}  // namespace
}  // namespace lockstep

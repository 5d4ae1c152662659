#include "kernels/cpu/gdn_conv.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/gdn_state.h"
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

const std::vector<int64_t> kLengths = {1, 2, 3, 4, 5, 17, 100};

struct Case {
  GdnShape shape;
  const char* name;
};
const Case kCases[] = {
    {{.key_heads = 2, .value_heads = 2, .key_dim = 96, .value_dim = 192, .conv_width = 4}, "width4_channels768"},
    {{.key_heads = 1, .value_heads = 3, .key_dim = 24, .value_dim = 41, .conv_width = 4}, "width4_channels171"},
    {{.key_heads = 1, .value_heads = 1, .key_dim = 8, .value_dim = 5, .conv_width = 2}, "width2_channels21"},
    {{.key_heads = 1, .value_heads = 1, .key_dim = 8, .value_dim = 5, .conv_width = 1}, "width1_channels21"},
    {{.key_heads = 1, .value_heads = 1, .key_dim = 8, .value_dim = 5, .conv_width = 7}, "width7_channels21"},
};

NumericsProfile ProfileWith(const std::string& name, ConvCasts casts) {
  NumericsProfile profile = FindNumericsProfile(name).value();
  profile.conv = casts;
  return profile;
}

std::vector<Matrix> RunConv(const NumericsProfile& profile, const GdnShape& shape, const std::vector<int64_t>& lengths,
                            SequenceInputs& inputs, Matrix& weight, const Schedule& schedule, int threads) {
  ThreadPool pool(threads);
  ThreadScratch scratch(threads);
  const CpuContext ctx = {profile, pool, scratch};
  const int64_t bytes = CpuGdnStateBytes(ctx, shape);
  std::vector<AlignedBuffer> slots;
  for (size_t i = 0; i < lengths.size(); ++i) {
    slots.emplace_back(bytes);
    std::memset(slots[i].data(), 0xFF, bytes);
    CpuGdnResetState(ctx, shape, slots[i].data());
  }
  return RunSchedule(
      schedule, lengths, inputs, shape.conv_channels(),
      [&](std::vector<Piece>& pieces, const std::vector<int64_t>& sequences, std::vector<Matrix>& in, Matrix& out) {
        for (size_t p = 0; p < pieces.size(); ++p) pieces[p].gdn_state = slots[sequences[p]].data();
        CpuGdnConv(ctx, in[0].view(), weight.row(0), shape, pieces, out.view());
      });
}

SequenceInputs MakeInputs(const GdnShape& shape, bool bf16, uint32_t seed) {
  SequenceInputs inputs(1);
  for (const int64_t length : kLengths) inputs[0].emplace_back(length, shape.conv_channels()).Fill(seed++, bf16);
  return inputs;
}

class GdnConvTest : public ::testing::TestWithParam<Case> {};

// fp32: width products and sums, each within 2^-24 of the sum of magnitudes m; SiLU's slope is at most 1.1, its own
// arithmetic (exp, add, divide) within 4 * 2^-24 of its value. bf16: 2^-8 of the sum more where it is rounded first,
// and 2^-8 of the result.
TEST_P(GdnConvTest, MatchesFp64) {
  const GdnShape& shape = GetParam().shape;
  for (const char* name : {"fp32", "hf-torch"}) {
    for (const ConvCasts casts : {ConvCasts::kTwo, ConvCasts::kOne}) {
      const NumericsProfile profile = ProfileWith(name, casts);
      const bool bf16 = profile.activations == DType::kBF16;
      SequenceInputs inputs = MakeInputs(shape, bf16, 1);
      Matrix weight(1, shape.conv_channels() * shape.conv_width);
      weight.Fill(99, bf16, 0.5f);
      std::vector<Matrix> out = RunConv(profile, shape, kLengths, inputs, weight, WholeSchedule(kLengths), 2);
      for (size_t i = 0; i < kLengths.size(); ++i) {
        for (int64_t t = 0; t < kLengths[i]; ++t) {
          for (int64_t c = 0; c < shape.conv_channels(); ++c) {
            double sum = 0.0;
            double magnitude = 0.0;
            for (int64_t tap = 0; tap < shape.conv_width; ++tap) {
              const int64_t from = t - (shape.conv_width - 1) + tap;
              const double term =
                  from < 0 ? 0.0
                           : static_cast<double>(inputs[0][i].at(from, c)) * weight.row(0)[c * shape.conv_width + tap];
              sum += term;
              magnitude += std::abs(term);
            }
            const double want = sum / (1.0 + std::exp(-sum));
            double bound = 1.1 * static_cast<double>(shape.conv_width) * testing::kUnitF32 * magnitude +
                           4 * testing::kUnitF32 * std::abs(want);
            if (bf16)
              bound +=
                  testing::kUnitBf16 * (std::abs(want) + (casts == ConvCasts::kTwo ? 1.1 * std::abs(sum) : 0.0)) * 1.01;
            const double error = std::abs(out[i].at(t, c) - want);
            ASSERT_TRUE(error <= bound + 1e-30)
                << name << " row " << t << " channel " << c << ": " << out[i].at(t, c) << ", want " << want;
            if (bf16) {
              ASSERT_EQ(out[i].at(t, c), RoundBf16(out[i].at(t, c)));
            }
          }
        }
      }
    }
  }
}

// Where the two casts differ at all, they must differ as the profile says: an exact restatement on one tap.
TEST(GdnConvCasts, RoundsWhereTheProfileSays) {
  const GdnShape shape = {.key_heads = 1, .value_heads = 1, .key_dim = 8, .value_dim = 5, .conv_width = 1};
  Matrix weight(1, shape.conv_channels());
  weight.Fill(5, true);
  SequenceInputs inputs = MakeInputs(shape, true, 6);
  std::vector<Matrix> two =
      RunConv(ProfileWith("hf", ConvCasts::kTwo), shape, kLengths, inputs, weight, WholeSchedule(kLengths), 1);
  std::vector<Matrix> one =
      RunConv(ProfileWith("hf", ConvCasts::kOne), shape, kLengths, inputs, weight, WholeSchedule(kLengths), 1);
  int64_t differing = 0;
  int64_t two_nearest = 0;
  int64_t one_nearest = 0;
  int64_t count = 0;
  for (size_t i = 0; i < kLengths.size(); ++i) {
    for (int64_t t = 0; t < kLengths[i]; ++t) {
      for (int64_t c = 0; c < shape.conv_channels(); ++c) {
        const double product = static_cast<double>(inputs[0][i].at(t, c)) * weight.row(0)[c];
        const auto silu = [](double x) { return static_cast<float>(x / (1.0 + std::exp(-x))); };
        two_nearest += two[i].at(t, c) == RoundBf16(silu(RoundBf16(static_cast<float>(product))));
        one_nearest += one[i].at(t, c) == RoundBf16(silu(product));
        differing += two[i].at(t, c) != one[i].at(t, c);
        ++count;
      }
    }
  }
  EXPECT_GT(differing, count / 10);
  // fp32 SiLU against fp64 turns a bf16 rounding in one of 2^14 cases or so.
  EXPECT_GE(two_nearest, count - 3);
  EXPECT_GE(one_nearest, count - 3);
}

TEST_P(GdnConvTest, NoScheduleShowsInTheBits) {
  const GdnShape& shape = GetParam().shape;
  for (const char* name : {"fp32", "hf"}) {
    const NumericsProfile profile = FindNumericsProfile(name).value();
    SequenceInputs inputs = MakeInputs(shape, profile.activations == DType::kBF16, 3);
    Matrix weight(1, shape.conv_channels() * shape.conv_width);
    weight.Fill(98, false, 0.5f);
    std::vector<Matrix> want = RunConv(profile, shape, kLengths, inputs, weight, WholeSchedule(kLengths), 1);
    const auto check = [&](const Schedule& schedule, int threads) {
      std::vector<Matrix> got = RunConv(profile, shape, kLengths, inputs, weight, schedule, threads);
      EXPECT_EQ(DifferingRows(got, want), 0) << name;
    };
    check(TokenSchedule(kLengths), 2);
    check(WholeSchedule(kLengths), 3);
    for (uint32_t seed = 0; seed < 4; ++seed) check(RandomSchedule(kLengths, 1 + 3 * seed, seed), 2);
    ForEachTarget([&] { check(RandomSchedule(kLengths, 7, 50), 1); });
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, GdnConvTest, ::testing::ValuesIn(kCases),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace lockstep

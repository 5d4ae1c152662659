// Row-wise and element-wise operations against PyTorch's and fla's GPU bits (tests/data/gpu_bits, torch_ops,
// gdn_fixture), and what other orders and roundings would get wrong.
#include "kernels/oracle/row_ops.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/special_functions.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

class RmsNormBits : public ::testing::TestWithParam<int> {
 protected:
  std::string Name(const std::string& what) const { return "torch_ops/rms" + std::to_string(GetParam()) + "_" + what; }

  std::vector<float> Squares(int row) const {
    std::vector<float> squares;
    for (int i = 0; i < GetParam(); ++i) {
      squares.push_back(Bf16ToF32(x_[row * GetParam() + i]) * Bf16ToF32(x_[row * GetParam() + i]));
    }
    return squares;
  }

  int rows() const { return static_cast<int>(mean_.size()); }

  std::vector<uint16_t> x_ = ReadData<uint16_t>(Name("x.bf16"));
  std::vector<uint16_t> weight_ = ReadData<uint16_t>(Name("w.bf16"));
  std::vector<float> mean_ = ReadData<float>(Name("mean.f32"));
  std::vector<uint16_t> y_ = ReadData<uint16_t>(Name("y.bf16"));
};

TEST_P(RmsNormBits, MeanAndNormAreTheGpus) {
  const size_t width = GetParam();
  std::vector<float> means;
  std::vector<uint16_t> y(y_.size());
  for (int r = 0; r < rows(); ++r) {
    means.push_back(RowMean(Squares(r)));
    RmsNorm({&x_[r * width], width}, weight_, 1e-6f, &y[r * width]);
  }
  EXPECT_EQ(Differing(means, mean_), 0);
  EXPECT_EQ(Differing(y, y_), 0);
}

TEST_P(RmsNormBits, OtherOrdersOfTheMeanDiffer) {
  std::vector<float> sequential, lane_by_lane;
  for (int r = 0; r < rows(); ++r) {
    const std::vector<float> squares = Squares(r);
    float sum = 0.0f;
    std::array<float, 32> lanes = {};
    for (size_t i = 0; i < squares.size(); ++i) {
      sum += squares[i];
      lanes[i % 32] += squares[i];
    }
    for (int distance = 16; distance >= 1; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) lanes[lane] += lanes[lane + distance];
    }
    sequential.push_back(sum / static_cast<float>(squares.size()));
    lane_by_lane.push_back(lanes[0] / static_cast<float>(squares.size()));
  }
  EXPECT_GT(Differing(sequential, mean_), rows() / 2);
  EXPECT_GT(Differing(lane_by_lane, mean_), rows() / 4);
}

INSTANTIATE_TEST_SUITE_P(Widths, RmsNormBits, ::testing::Values(192, 3840));

class L2NormBits : public ::testing::TestWithParam<const char*> {};

TEST_P(L2NormBits, AreFlas) {
  constexpr size_t kWidth = 96;
  const std::string name = GetParam();
  const std::vector<uint16_t> x = ReadData<uint16_t>("gdn_fixture/" + name + ".bf16");
  const std::vector<uint16_t> want = ReadData<uint16_t>("gpu_bits/gdn_" + name + "n.bf16");
  std::vector<uint16_t> got(x.size()), rounded_inverse(x.size());
  for (size_t begin = 0; begin < x.size(); begin += kWidth) {
    L2Norm({&x[begin], kWidth}, &got[begin]);
    float sum = 0.0f;
    for (size_t i = begin; i < begin + kWidth; ++i) sum += Bf16ToF32(x[i]) * Bf16ToF32(x[i]);
    const float inverse = RoundBf16(1.0f / std::sqrt(sum + 1e-6f));
    for (size_t i = begin; i < begin + kWidth; ++i) rounded_inverse[i] = ToBf16(Bf16ToF32(x[i]) * inverse);
  }
  EXPECT_EQ(Differing(got, want), 0);
  // The order of the sum does not show in these rows' bf16: a last bit of fp32 flips one element in about 200,000.
  EXPECT_GT(Differing(rounded_inverse, want), 1000);
}

INSTANTIATE_TEST_SUITE_P(Rows, L2NormBits, ::testing::Values("q", "k"));

TEST(Conv, TapsAndSiluAreThePyTorchFallbacks) {
  const std::vector<uint16_t> x = ReadData<uint16_t>("gpu_bits/conv_x.bf16");
  const std::vector<uint16_t> weight = ReadData<uint16_t>("gpu_bits/conv_w.bf16");
  const std::vector<uint16_t> y = ReadData<uint16_t>("gpu_bits/conv_y.bf16");
  const std::vector<uint16_t> silu = ReadData<uint16_t>("gpu_bits/conv_silu.bf16");
  const int channels = static_cast<int>(weight.size()) / 4;
  const int rows = static_cast<int>(x.size()) / channels;
  std::vector<uint16_t> got, got_silu, rounded_once, backwards;
  for (int c = 0; c < channels; ++c) {
    for (int t = 0; t < rows; ++t) {
      uint16_t taps[4];
      for (int i = 0; i < 4; ++i) taps[i] = t - 3 + i < 0 ? 0 : x[c * rows + t - 3 + i];
      got.push_back(ConvTaps(taps, &weight[c * 4]));
      got_silu.push_back(SiluBf16(got.back()));
      float sum = 0.0f, reverse = 0.0f;
      for (int i = 0; i < 4; ++i) sum += Bf16ToF32(taps[i]) * Bf16ToF32(weight[c * 4 + i]);
      for (int i = 3; i >= 0; --i) reverse += Bf16ToF32(taps[i]) * Bf16ToF32(weight[c * 4 + i]);
      rounded_once.push_back(ToBf16(Silu(sum)));
      backwards.push_back(ToBf16(reverse));
    }
  }
  EXPECT_EQ(Differing(got, y), 0);
  EXPECT_EQ(Differing(got_silu, silu), 0);
  EXPECT_GT(Differing(rounded_once, silu), 500);
  // The order of four products hardly ever shows in bf16: nothing in the recording depends on it.
  EXPECT_LT(Differing(backwards, y), 3);
}

TEST(Unary, SiluOfEveryBf16Value) {
  const std::vector<uint16_t> want = ReadData<uint16_t>("torch_ops/unary_silu.bf16");
  ASSERT_EQ(want.size(), 65536u);
  std::vector<uint16_t> got;
  for (int bits = 0; bits < 65536; ++bits) got.push_back(SiluBf16(static_cast<uint16_t>(bits)));
  EXPECT_EQ(Differing(got, want), 0);
}

TEST(Unary, SigmoidOfBf16Values) {
  const std::vector<uint16_t> want = ReadData<uint16_t>("gpu_bits/sigmoid.bf16");
  std::vector<uint16_t> got;
  for (const int sign : {0, 0x8000}) {
    for (int bits = 0x3C00; bits < 0x4280; bits += 2) got.push_back(SigmoidBf16(static_cast<uint16_t>(sign | bits)));
  }
  EXPECT_EQ(Differing(got, want), 0);
}

TEST(Unary, SoftplusAndSiluInFp32) {
  const std::vector<float> x = ReadData<float>("gpu_bits/x.f32");
  std::vector<float> softplus, silu, by_library;
  for (const float v : x) {
    softplus.push_back(Softplus(v));
    silu.push_back(Silu(v));
    by_library.push_back(v / (1.0f + std::exp(-v)));
  }
  EXPECT_EQ(Differing(softplus, ReadData<float>("gpu_bits/softplus.f32")), 0);
  EXPECT_EQ(Differing(silu, ReadData<float>("gpu_bits/silu.f32")), 0);
  EXPECT_GT(Differing(by_library, silu), 100);
}

TEST(Unary, NanIsTheGpusBf16Nan) {
  EXPECT_EQ(ToBf16(std::nanf("")), 0x7FFF);
  EXPECT_EQ(ToBf16(-std::nanf("")), 0x7FFF);
  EXPECT_EQ(ToBf16(1.0f), 0x3F80);
}

// Compositions; their parts are held against recordings above.
TEST(Gates, RoundWhereTheModelDoes) {
  const uint16_t one = F32ToBf16(1.0f);
  EXPECT_EQ(GdnBeta(0), one);
  EXPECT_EQ(GdnBeta(F32ToBf16(0.7f)), F32ToBf16(2.0f * Bf16ToF32(SigmoidBf16(F32ToBf16(0.7f)))));
  EXPECT_EQ(GdnDecay(0.5f, one, -3.0f), -Exp(0.5f) * Softplus(-2.0f));
  EXPECT_EQ(SwiGlu(F32ToBf16(1.5f), F32ToBf16(0.3f)), F32ToBf16(RoundBf16(Silu(1.5f)) * Bf16ToF32(F32ToBf16(0.3f))));
}

TEST(GatedRmsNorm, RoundsThreeTimes) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(192), weight(192), gate(192), y(192), norm(192);
  for (int i = 0; i < 192; ++i) {
    x[i] = F32ToBf16(normal(random));
    weight[i] = F32ToBf16(1.0f + 0.1f * normal(random));
    gate[i] = F32ToBf16(normal(random));
  }
  GatedRmsNorm(x, weight, gate, 1e-5f, y.data());
  RmsNorm(x, std::vector<uint16_t>(192, F32ToBf16(1.0f)), 1e-5f, norm.data());
  std::vector<uint16_t> want;
  for (int i = 0; i < 192; ++i) {
    const float weighted = RoundBf16(Bf16ToF32(weight[i]) * Bf16ToF32(norm[i]));
    want.push_back(F32ToBf16(weighted * Silu(Bf16ToF32(gate[i]))));
  }
  EXPECT_EQ(Differing(y, want), 0);
}

TEST(LogSoftmaxRow, HasPyTorchsBits) {
  const std::vector<uint16_t> bits = ReadData<uint16_t>("gpu_bits/logits.bf16");
  const std::vector<float> want = ReadData<float>("gpu_bits/log_softmax.f32");
  std::vector<float> logits;
  for (const uint16_t b : bits) logits.push_back(Bf16ToF32(b));
  const LogSoftmax row = LogSoftmaxRow(logits);
  float sum = 0.0f;
  double exact = 0.0;
  for (const float x : logits) {
    sum += Exp(x - row.maximum);
    exact += std::exp(static_cast<double>(x) - row.maximum);
  }
  const LogSoftmax sequential = {.maximum = row.maximum, .log_sum = Log(sum)};
  std::vector<float> got, one_by_one;
  for (size_t i = 0; i < want.size(); ++i) {
    const float x = logits[i * 997];
    got.push_back(row(x));
    one_by_one.push_back(sequential(x));
  }
  EXPECT_EQ(Differing(got, want), 0);
  EXPECT_NEAR(row.log_sum, std::log(exact), 1e-6);
  EXPECT_GT(Differing(one_by_one, want), 50);
}

// The kernel as its 1,024 threads run it, for rows of any width and alignment in memory.
float LogSumByThreads(std::span<const float> row, int misaligned, float maximum) {
  constexpr int kThreads = 1024;
  std::vector<float> sums(kThreads, 0.0f);
  for (int thread = 0; thread < kThreads; ++thread) {
    float& sum = sums[thread];
    const int width = static_cast<int>(row.size());
    int begin = 0;
    if (misaligned > 0) {
      if (thread >= misaligned && thread - misaligned < width) sum += Exp(row[thread - misaligned] - maximum);
      begin = std::min(width, kThreads - misaligned);
    }
    const int rest = (width - begin) % (4 * kThreads);
    for (int i = begin + 4 * thread; i < width - rest; i += 4 * kThreads) {
      for (int j = 0; j < 4; ++j) sum += Exp(row[i + j] - maximum);
    }
    for (int i = width - rest + thread; i < width; i += kThreads) sum += Exp(row[i] - maximum);
  }
  for (int distance = 16; distance >= 1; distance /= 2) {
    for (int thread = 0; thread < kThreads; ++thread) {
      if (thread % 32 < distance) sums[thread] += sums[thread + distance];
    }
  }
  std::vector<float> warps;
  for (int warp = 0; warp < 32; ++warp) warps.push_back(sums[32 * warp]);
  for (int distance = 16; distance >= 1; distance /= 2) {
    for (int warp = 0; warp < distance; ++warp) warps[warp] += warps[warp + distance];
  }
  return Log(warps[0]);
}

TEST(LogSoftmaxRow, AnyWidthAndAlignment) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  int alignment_shows = 0;
  for (const int width : {1, 5, 1000, 1023, 1024, 4097, 6000, 20001}) {
    std::vector<float> row;
    for (int i = 0; i < width; ++i) row.push_back(3.0f * normal(random));
    for (const int misaligned : {0, 1, 2, 3}) {
      const LogSoftmax got = LogSoftmaxRow(row, misaligned);
      EXPECT_TRUE(SameBits(got.log_sum, LogSumByThreads(row, misaligned, got.maximum))) << width << " " << misaligned;
      alignment_shows += !SameBits(got.log_sum, LogSoftmaxRow(row).log_sum);
    }
  }
  EXPECT_GT(alignment_shows, 3);
}

}  // namespace
}  // namespace lockstep::oracle

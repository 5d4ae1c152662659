// RmsNorm, its fusions with the residual, and Add: in bits against a scalar program of the same order, and against
// fp64.
#include "kernels/cpu/rms_norm.h"

#include <cmath>
#include <utility>

#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::kUnitBf16;
using testing::kUnitF32;
using testing::Matrix;
using testing::TestContext;

// 9,000 goes through two levels of PyTorch's sum.
const int64_t kWidths[] = {1, 2, 15, 16, 17, 31, 40, 96, 100, 256, 511, 512, 1000, 3840, 9000};
constexpr float kEps = 1e-6f;

// SquareSum::kLanes16: 16 lanes by fused multiply-add, a tree of 8, 4, 2, 1.
float LanesSum(const float* x, int64_t width) {
  float lanes[16] = {};
  for (int64_t i = 0; i < width; ++i) lanes[i % 16] = std::fma(x[i], x[i], lanes[i % 16]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// SquareSum::kTorchCpu: rounded squares; accumulators [4][8], the sum of 16 steps of 32 elements moved up a level, that
// of 16 such sums another one (rows of 131,072 and more would need a fourth).
float TorchSum(const float* x, int64_t width) {
  float level[3][32] = {};
  const int64_t steps = width / 32;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t lane = 0; lane < 32; ++lane) level[0][lane] += x[step * 32 + lane] * x[step * 32 + lane];
    for (int up = 1, every = 16; up < 3 && (step + 1) % every == 0; ++up, every *= 16) {
      for (int64_t lane = 0; lane < 32; ++lane) level[up][lane] += std::exchange(level[up - 1][lane], 0.0f);
    }
  }
  for (int64_t lane = 0; lane < 32; ++lane) level[0][lane] = level[0][lane] + level[1][lane] + level[2][lane];
  int64_t i = steps * 32;
  for (; i + 8 <= width; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) level[0][lane] += x[i + lane] * x[i + lane];
  }
  float total = 0.0f;
  for (; i < width; ++i) total += x[i] * x[i];
  for (int lane = 0; lane < 8; ++lane)
    total += level[0][lane] + level[0][lane + 8] + level[0][lane + 16] + level[0][lane + 24];
  return total;
}

// The stated order: (x * inverse) * weight.
std::vector<float> NormInOrder(const NumericsProfile& profile, const float* x, const float* weight, int64_t width) {
  const bool bf16 = profile.activations == DType::kBF16;
  const float sum = profile.square_sum == SquareSum::kTorchCpu ? TorchSum(x, width) : LanesSum(x, width);
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(width) + kEps);
  std::vector<float> out(width);
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = x[i] * inverse;
    const float y = weight[i] * scaled;
    out[i] = bf16 ? RoundBf16(y) : y;
  }
  return out;
}

float Round(float value, bool bf16) {
  return bf16 ? RoundBf16(value) : value;
}

bool bf16_residual(TestContext& context) {
  return context.get().profile.residual == DType::kBF16;
}

class RmsNormTest : public ::testing::TestWithParam<const char*> {};

TEST_P(RmsNormTest, MatchesFp64) {
  TestContext context(GetParam());
  for (const int64_t width : kWidths) {
    Matrix x(3, width);
    Matrix weight(1, width);
    Matrix out(3, width);
    x.Fill(1, context.bf16(), 3.0f);
    weight.Fill(2, false);
    CpuRmsNorm(context.get(), x.view(), weight.row(0), kEps, out.view());
    for (int64_t r = 0; r < 3; ++r) {
      double squares = 0;
      for (int64_t i = 0; i < width; ++i) squares += static_cast<double>(x.at(r, i)) * x.at(r, i);
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(width) + kEps);
      for (int64_t i = 0; i < width; ++i) {
        const double exact = x.at(r, i) * inverse * weight.at(0, i);
        // width / 16 + 4 roundings of a sum of positive terms, of which the root halves the error; then mean, eps,
        // root, quotient, two products.
        const double relative = (static_cast<double>(width) / 32 + 8) * kUnitF32 + (context.bf16() ? kUnitBf16 : 0);
        ASSERT_LE(std::abs(out.at(r, i) - exact), relative * 1.01 * std::abs(exact)) << width << " " << i;
      }
    }
  }
}

TEST_P(RmsNormTest, SameBitsAsTheStatedOrderOnEveryTargetThreadsAndRowCount) {
  for (const int64_t width : kWidths) {
    for (const int threads : {1, 2, 3}) {
      TestContext context(GetParam(), threads);
      constexpr int64_t kRows = 40;
      Matrix x(kRows, width);
      Matrix weight(1, width);
      x.Fill(3, context.bf16());
      weight.Fill(4, false);
      ForEachTarget([&] {
        Matrix out(kRows, width);
        CpuRmsNorm(context.get(), x.view(), weight.row(0), kEps, out.view());
        EXPECT_EQ(out.TouchedOutside(), 0);
        for (int64_t r = 0; r < kRows; ++r) {
          const auto expected = NormInOrder(context.get().profile, x.row(r), weight.row(0), width);
          ASSERT_EQ(std::memcmp(out.row(r), expected.data(), width * sizeof(float)), 0) << width << " row " << r;
        }
        Matrix alone(1, width);
        CpuRmsNorm(context.get(), x.view().slice(kRows - 1, 1), weight.row(0), kEps, alone.view());
        EXPECT_EQ(DifferingRows(alone, 0, out, kRows - 1, 1), 0);
      });
    }
  }
}

TEST_P(RmsNormTest, InPlace) {
  TestContext context(GetParam());
  Matrix x(5, 100);
  Matrix weight(1, 100);
  x.Fill(5, context.bf16());
  weight.Fill(6, false);
  Matrix out(5, 100);
  CpuRmsNorm(context.get(), x.view(), weight.row(0), kEps, out.view());
  CpuRmsNorm(context.get(), x.view(), weight.row(0), kEps, x.view());
  EXPECT_EQ(DifferingRows(x, 0, out, 0, 5), 0);
}

TEST_P(RmsNormTest, AddRmsNormRoundsTheResidualFirst) {
  TestContext context(GetParam(), 2);
  for (const int64_t width : kWidths) {
    Matrix x(9, width);
    Matrix residual(9, width);
    Matrix weight(1, width);
    x.Fill(7, context.bf16());
    residual.Fill(8, bf16_residual(context), 10.0f);
    weight.Fill(9, false);
    const Matrix before = residual;
    ForEachTarget([&] {
      Matrix sum = before;
      Matrix start = before;
      Matrix out(9, width);
      CpuAddRmsNorm(context.get(), x.view(), sum.view(), weight.row(0), kEps, out.view());
      EXPECT_EQ(out.TouchedOutside() + sum.TouchedOutside(), 0);
      for (int64_t r = 0; r < 9; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          ASSERT_EQ(sum.at(r, i), Round(start.at(r, i) + x.at(r, i), bf16_residual(context)));
        }
        const auto expected = NormInOrder(context.get().profile, sum.row(r), weight.row(0), width);
        ASSERT_EQ(std::memcmp(out.row(r), expected.data(), width * sizeof(float)), 0) << width << " row " << r;
      }
    });
  }
}

TEST_P(RmsNormTest, RmsNormAddRoundsTheNormFirst) {
  TestContext context(GetParam(), 2);
  for (const int64_t width : kWidths) {
    Matrix x(9, width);
    Matrix residual(9, width);
    Matrix weight(1, width);
    x.Fill(10, context.bf16(), 10.0f);
    residual.Fill(11, bf16_residual(context));
    weight.Fill(12, false);
    const Matrix before = residual;
    ForEachTarget([&] {
      Matrix sum = before;
      Matrix start = before;
      CpuRmsNormAdd(context.get(), x.view(), weight.row(0), kEps, sum.view());
      EXPECT_EQ(sum.TouchedOutside(), 0);
      for (int64_t r = 0; r < 9; ++r) {
        const auto norm = NormInOrder(context.get().profile, x.row(r), weight.row(0), width);
        for (int64_t i = 0; i < width; ++i) {
          ASSERT_EQ(sum.at(r, i), Round(start.at(r, i) + norm[i], bf16_residual(context))) << width << " " << i;
        }
      }
    });
  }
}

TEST_P(RmsNormTest, AddIsOneRounding) {
  TestContext context(GetParam(), 2);
  for (const int64_t width : kWidths) {
    Matrix x(40, width);
    Matrix residual(40, width);
    x.Fill(13, context.bf16());
    residual.Fill(14, bf16_residual(context), 100.0f);
    Matrix before = residual;
    ForEachTarget([&] {
      Matrix sum = before;
      CpuAdd(context.get(), x.view(), sum.view());
      EXPECT_EQ(sum.TouchedOutside(), 0);
      for (int64_t r = 0; r < 40; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          ASSERT_EQ(sum.at(r, i), Round(before.at(r, i) + x.at(r, i), bf16_residual(context)));
        }
      }
    });
  }
}

TEST_P(RmsNormTest, AZeroRowIsZeroAndANanRowStaysAlone) {
  TestContext context(GetParam());
  Matrix x(3, 20);
  Matrix weight(1, 20);
  weight.Fill(1, false);
  x.Fill(2, true);
  for (int64_t i = 0; i < 20; ++i) x.row(1)[i] = 0;
  x.row(0)[3] = std::nanf("");
  Matrix out(3, 20);
  CpuRmsNorm(context.get(), x.view(), weight.row(0), kEps, out.view());
  for (int64_t i = 0; i < 20; ++i) {
    EXPECT_TRUE(std::isnan(out.at(0, i)));
    EXPECT_EQ(out.at(1, i), 0.0f);
    EXPECT_FALSE(std::isnan(out.at(2, i)));
  }
}

TEST_P(RmsNormTest, RoundResidualRoundsToTheActivations) {
  TestContext context(GetParam(), 2);
  for (const int64_t width : kWidths) {
    Matrix x(9, width);
    x.Fill(15, bf16_residual(context), 10.0f);
    ForEachTarget([&] {
      Matrix out(9, width);
      CpuRoundResidual(context.get(), x.view(), out.view());
      EXPECT_EQ(out.Unwritten() + out.TouchedOutside(), 0);
      for (int64_t r = 0; r < 9; ++r) {
        for (int64_t i = 0; i < width; ++i) ASSERT_EQ(out.at(r, i), Round(x.at(r, i), context.bf16()));
      }
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Profiles, RmsNormTest, ::testing::Values("hf", "hf-autocast", "hf-torch", "fp32"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace lockstep

// The linear chain against its definition in fp64, and against other orders.
#include "kernels/oracle/linear.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

class LinearChain : public ::testing::TestWithParam<int> {
 protected:
  LinearChain() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int i = 0; i < kRows * GetParam(); ++i) x_.push_back(F32ToBf16(normal(random)));
    for (int i = 0; i < kOutputs * GetParam(); ++i) weight_.push_back(F32ToBf16(normal(random) * 0.02f));
  }

  LinearShape Shape() const { return {.rows = kRows, .inputs = GetParam(), .outputs = kOutputs}; }

  double Product(int row, int output, int k) const {
    return static_cast<double>(Bf16ToF32(x_[row * GetParam() + k])) * Bf16ToF32(weight_[output * GetParam() + k]);
  }

  // Sixteen products aligned with the sum, cut, added, cut: normal numbers only.
  float Step(float sum, int row, int output, int begin) const {
    int top = sum == 0.0f ? -1000 : std::ilogb(sum);
    const int end = std::min(begin + 16, GetParam());
    for (int k = begin; k < end; ++k) {
      // The exponent of a product is that of its factors, added.
      top = std::max(top, std::ilogb(Bf16ToF32(x_[row * GetParam() + k])) +
                              std::ilogb(Bf16ToF32(weight_[output * GetParam() + k])));
    }
    double total = std::trunc(std::ldexp(static_cast<double>(sum), 25 - top));
    for (int k = begin; k < end; ++k) total += std::trunc(std::ldexp(Product(row, output, k), 25 - top));
    const int last_bit = std::ilogb(total) - 23;
    return static_cast<float>(std::ldexp(std::trunc(std::ldexp(total, -last_bit)), last_bit + top - 25));
  }

  static constexpr int kRows = 3;
  static constexpr int kOutputs = 40;
  std::vector<uint16_t> x_, weight_;
};

TEST_P(LinearChain, IsTheAscendingChain) {
  std::vector<float> sums(kRows * kOutputs), want, descending, fused;
  LinearSums(Shape(), x_.data(), weight_.data(), sums.data());
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kOutputs; ++n) {
      float up = 0.0f, down = 0.0f, fma = 0.0f;
      for (int k = 0; k < GetParam(); k += 16) up = Step(up, r, n, k);
      for (int k = (GetParam() - 1) / 16 * 16; k >= 0; k -= 16) down = Step(down, r, n, k);
      for (int k = 0; k < GetParam(); ++k) {
        fma = std::fma(Bf16ToF32(x_[r * GetParam() + k]), Bf16ToF32(weight_[n * GetParam() + k]), fma);
      }
      want.push_back(up);
      descending.push_back(down);
      fused.push_back(fma);
    }
  }
  EXPECT_EQ(Differing(sums, want), 0);
  if (GetParam() > 100) {
    EXPECT_GT(Differing(descending, want), kRows * kOutputs / 2);
    EXPECT_GT(Differing(fused, want), kRows * kOutputs / 2);
  }

  std::vector<uint16_t> y(sums.size()), rounded;
  Linear(Shape(), x_.data(), weight_.data(), y.data());
  for (const float sum : sums) rounded.push_back(F32ToBf16(sum));
  EXPECT_EQ(Differing(y, rounded), 0);
}

TEST_P(LinearChain, ARowIsItsOwn) {
  std::vector<float> all(kRows * kOutputs), one(kOutputs);
  LinearSums(Shape(), x_.data(), weight_.data(), all.data());
  LinearShape shape = Shape();
  shape.rows = 1;
  LinearSums(shape, &x_[2 * GetParam()], weight_.data(), one.data());
  EXPECT_EQ(Differing(one, std::vector<float>(all.begin() + 2 * kOutputs, all.end())), 0);
}

INSTANTIATE_TEST_SUITE_P(Inputs, LinearChain, ::testing::Values(16, 40, 256, 3840));

}  // namespace
}  // namespace lockstep::oracle

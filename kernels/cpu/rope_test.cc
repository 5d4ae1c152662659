#include "kernels/cpu/rope.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::Matrix;
using testing::TestContext;

std::vector<float> InverseFrequencies(int64_t head_dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim; i += 2) {
    frequencies.push_back(
        static_cast<float>(std::pow(500000.0, -static_cast<double>(i) / static_cast<double>(head_dim))));
  }
  return frequencies;
}

const std::vector<int64_t> kPositions = {0,    1,     2,   3,   7,      63,     64,      1000,
                                         4095, 65535, 355, 710, 103993, 999999, 1000000, 16777215};

// The angle is an fp32 product, so it is taken as such; its cos and sin come correctly rounded, two products and a sum
// follow: 3 * 2^-24 of
// (|x1| + |x2|) * scaling, and half a bf16 step of the result where it is rounded.
TEST(Rope, MatchesFp64) {
  for (const char* profile : {"fp32", "hf"}) {
    for (const int64_t head_dim : {2, 16, 24, 64, 128}) {
      TestContext context(profile, 2);
      const std::vector<float> frequencies = InverseFrequencies(head_dim);
      const int64_t rows = static_cast<int64_t>(kPositions.size());
      constexpr float kScaling = 1.2079441f;
      Matrix x(rows, 3 * head_dim);
      x.Fill(1, context.bf16());
      Matrix before = x;
      CpuRope(context.get(), x.view(), kPositions, frequencies, kScaling, head_dim);
      EXPECT_EQ(x.TouchedOutside(), 0);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < 3 * head_dim; ++c) {
          const int64_t i = c % head_dim;
          const int64_t half = head_dim / 2;
          const double angle = static_cast<float>(kPositions[r]) * frequencies[i % half];
          const double self = before.at(r, c);
          const double other = i < half ? -before.at(r, c + half) : before.at(r, c - half);
          const double want = (self * std::cos(angle) + other * std::sin(angle)) * kScaling;
          double bound = 3 * testing::kUnitF32 * (std::abs(self) + std::abs(other)) * kScaling;
          if (context.bf16()) bound += testing::kUnitBf16 * std::abs(want);
          EXPECT_TRUE(std::abs(x.at(r, c) - want) <= bound)
              << "position " << kPositions[r] << " column " << c << ": " << x.at(r, c) << ", want " << want;
        }
      }
    }
  }
}

// cos and sin themselves, seen through the pair (1, 0), are the correctly rounded ones at every position tried.
TEST(Rope, CosAndSinAreCorrectlyRounded) {
  TestContext context("fp32", 2);
  const std::vector<float> frequencies = InverseFrequencies(128);
  constexpr int64_t kRows = 2000;
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < kRows; ++r) positions.push_back(r * 523);
  Matrix x(kRows, 128);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < 128; ++c) x.row(r)[c] = c < 64 ? 1.0f : 0.0f;
  }
  CpuRope(context.get(), x.view(), positions, frequencies, 1.0f, 128);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < 64; ++i) {
      const double angle = static_cast<float>(positions[r]) * frequencies[i];
      EXPECT_EQ(x.at(r, i), static_cast<float>(std::cos(angle))) << "angle " << angle;
      EXPECT_EQ(x.at(r, 64 + i), static_cast<float>(std::sin(angle))) << "angle " << angle;
    }
  }
}

TEST(Rope, NoBatchOrInstructionSetShowsInTheBits) {
  for (const char* profile : {"fp32", "hf"}) {
    TestContext context(profile, 3);
    const std::vector<float> frequencies = InverseFrequencies(40);
    const int64_t rows = static_cast<int64_t>(kPositions.size());
    Matrix all(rows, 80);
    all.Fill(2, context.bf16());
    Matrix input = all;
    CpuRope(context.get(), all.view(), kPositions, frequencies, 1.0f, 40);
    ForEachTarget([&] {
      TestContext single(profile);
      Matrix x = input;
      for (int64_t r = 0; r < rows; ++r)
        CpuRope(single.get(), x.view().slice(r, 1), {&kPositions[r], 1}, frequencies, 1.0f, 40);
      EXPECT_EQ(DifferingRows(all, 0, x, 0, rows), 0);
    });
  }
}

}  // namespace
}  // namespace lockstep

#include "kernels/cpu/gdn_gates.h"

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

struct Operands {
  Operands(int64_t rows, int64_t heads, bool bf16)
      : a(rows, heads), b(rows, heads), a_log(1, heads), dt_bias(1, heads), beta(rows, heads), g(rows, heads) {
    a.Fill(1, bf16, 8.0f);
    b.Fill(2, bf16, 8.0f);
    a_log.Fill(3, false, 1.5f);
    dt_bias.Fill(4, false, 2.0f);
  }
  Matrix a, b, a_log, dt_bias, beta, g;
};

// g: exp(A_log), exp, log1p, the sum before and the products behind: eight operations of relative error 2^-24 or a
// little more, and a + dt_bias is rounded itself, which softplus (slope at most 1) passes on. beta: exp, add, divide,
// within 4 * 2^-24; in bf16 one rounding (doubling is exact).
TEST(GdnGates, MatchesFp64) {
  for (const char* profile : {"fp32", "hf"}) {
    for (const bool neg_eigval : {false, true}) {
      for (const int64_t heads : {1, 3, 16, 30, 37}) {
        TestContext context(profile, 2);
        Operands x(200, heads, context.bf16());
        CpuGdnGates(context.get(), x.a.view(), x.b.view(), x.a_log.row(0), x.dt_bias.row(0), neg_eigval, x.beta.view(),
                    x.g.view());
        EXPECT_EQ(x.beta.Unwritten() + x.beta.TouchedOutside() + x.g.Unwritten() + x.g.TouchedOutside(), 0);
        for (int64_t r = 0; r < 200; ++r) {
          for (int64_t h = 0; h < heads; ++h) {
            const double sigmoid = 1.0 / (1.0 + std::exp(-static_cast<double>(x.b.at(r, h))));
            const double beta = neg_eigval ? 2.0 * sigmoid : sigmoid;
            const double beta_bound =
                beta * (4 * testing::kUnitF32 + (context.bf16() ? testing::kUnitBf16 * 1.01 : 0.0));
            EXPECT_TRUE(std::abs(x.beta.at(r, h) - beta) <= beta_bound) << x.beta.at(r, h) << ", want " << beta;
            const double sum = static_cast<double>(x.a.at(r, h)) + x.dt_bias.row(0)[h];
            const double rate = std::exp(static_cast<double>(x.a_log.row(0)[h]));
            const double g = -rate * std::log1p(std::exp(sum));
            // Softplus of a very negative x is e^x, whose relative error is x's absolute one.
            const double g_bound = std::abs(g) * 8 * testing::kUnitF32 +
                                   rate * std::abs(sum) * testing::kUnitF32 * std::exp(std::min(sum, 0.0));
            EXPECT_TRUE(std::abs(x.g.at(r, h) - g) <= g_bound)
                << "a + dt_bias " << sum << ": " << x.g.at(r, h) << ", want " << g;
          }
        }
      }
    }
  }
}

TEST(GdnGates, Edges) {
  TestContext context("fp32");
  Matrix a(1, 6), b(1, 6), zero(1, 6), beta(1, 6), g(1, 6);
  zero.Fill(0, false, 0.0f);
  const float values[] = {0.0f, -200.0f, 200.0f, 20.0f, 20.5f, -90.0f};
  std::copy_n(values, 6, a.row(0));
  std::copy_n(values, 6, b.row(0));
  CpuGdnGates(context.get(), a.view(), b.view(), zero.row(0), zero.row(0), false, beta.view(), g.view());
  EXPECT_EQ(beta.at(0, 0), 0.5f);
  EXPECT_EQ(beta.at(0, 1), 0.0f);
  EXPECT_EQ(beta.at(0, 2), 1.0f);
  EXPECT_FLOAT_EQ(g.at(0, 0), -std::log(2.0f));
  EXPECT_EQ(g.at(0, 1), 0.0f);
  EXPECT_EQ(g.at(0, 2), -200.0f);
  EXPECT_EQ(g.at(0, 3), -20.0f);
  EXPECT_EQ(g.at(0, 4), -20.5f);
  EXPECT_TRUE(g.at(0, 5) < 0.0f && g.at(0, 5) > -1e-38f) << g.at(0, 5);
}

TEST(GdnGates, NoBatchOrInstructionSetShowsInTheBits) {
  for (const char* profile : {"fp32", "hf"}) {
    TestContext context(profile, 3);
    Operands all(150, 30, context.bf16());
    CpuGdnGates(context.get(), all.a.view(), all.b.view(), all.a_log.row(0), all.dt_bias.row(0), true, all.beta.view(),
                all.g.view());
    ForEachTarget([&] {
      TestContext single(profile);
      Operands rows(150, 30, single.bf16());
      for (int64_t r = 0; r < 150; ++r) {
        CpuGdnGates(single.get(), rows.a.view().slice(r, 1), rows.b.view().slice(r, 1), rows.a_log.row(0),
                    rows.dt_bias.row(0), true, rows.beta.view().slice(r, 1), rows.g.view().slice(r, 1));
      }
      EXPECT_EQ(DifferingRows(all.beta, 0, rows.beta, 0, 150), 0);
      EXPECT_EQ(DifferingRows(all.g, 0, rows.g, 0, 150), 0);
    });
  }
}

}  // namespace
}  // namespace lockstep

#include "kernels/cpu/swiglu.h"

#include <cmath>

#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::kUnitBf16;
using testing::kUnitF32;
using testing::Matrix;
using testing::TestContext;

class SwiGluTest : public ::testing::TestWithParam<const char*> {};

TEST_P(SwiGluTest, MatchesFp64AndIsTheSameOnEveryTargetThreadsAndRowCount) {
  for (const int64_t width : {1, 2, 15, 16, 17, 30, 96, 257, 1000, 11008}) {
    for (const int64_t rows : {1, 2, 9, 33}) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << width);
      const bool bf16 = TestContext(GetParam()).bf16();
      Matrix gate_up(rows, 2 * width);
      gate_up.Fill(1, bf16, 4.0f);
      Matrix first(rows, width);
      bool have_first = false;
      for (const int threads : {1, 2, 3}) {
        TestContext context(GetParam(), threads);
        ForEachTarget([&] {
          Matrix out(rows, width);
          CpuSwiGlu(context.get(), gate_up.view(), out.view());
          EXPECT_EQ(out.Unwritten() + out.TouchedOutside(), 0);
          if (!have_first) first = out;
          have_first = true;
          EXPECT_EQ(DifferingRows(out, 0, first, 0, rows), 0) << threads << " threads";
          Matrix alone(1, width);
          CpuSwiGlu(context.get(), gate_up.view().slice(rows - 1, 1), alone.view());
          EXPECT_EQ(DifferingRows(alone, 0, first, rows - 1, 1), 0);
        });
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const double gate = gate_up.at(r, i);
          const double exact = gate / (1 + std::exp(-gate)) * gate_up.at(r, width + i);
          // silu within 4 units (see simd_util_test), one for the product; in bf16 two roundings more.
          const double relative = 5 * kUnitF32 + (bf16 ? 2 * kUnitBf16 : 0);
          ASSERT_LE(std::abs(first.at(r, i) - exact), relative * 1.01 * std::abs(exact)) << r << ", " << i;
        }
      }
    }
  }
}

TEST_P(SwiGluTest, SiluIsRoundedBeforeTheProduct) {
  TestContext context(GetParam());
  Matrix gate_up(1, 2000);
  gate_up.Fill(3, true);
  // up = 1 shows silu as it was rounded; multiplying that by up must give the other result.
  Matrix ones = gate_up;
  for (int64_t i = 1000; i < 2000; ++i) ones.row(0)[i] = 1.0f;
  Matrix silu(1, 1000);
  Matrix out(1, 1000);
  CpuSwiGlu(context.get(), ones.view(), silu.view());
  CpuSwiGlu(context.get(), gate_up.view(), out.view());
  for (int64_t i = 0; i < 1000; ++i) {
    const float product = silu.at(0, i) * gate_up.at(0, 1000 + i);
    EXPECT_EQ(out.at(0, i), context.bf16() ? RoundBf16(product) : product);
    if (context.bf16()) {
      EXPECT_EQ(silu.at(0, i), RoundBf16(silu.at(0, i)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Profiles, SwiGluTest, ::testing::Values("hf", "fp32"),
                         [](const auto& param) { return std::string(param.param) == "hf" ? "Bf16" : "Fp32"; });

}  // namespace
}  // namespace lockstep

#include "kernels/cpu/gated_rms_norm.h"

#include <cmath>

#include "gtest/gtest.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::Matrix;
using testing::TestContext;

constexpr float kEps = 1e-5f;

NumericsProfile ProfileWith(const char* name, GatedNormCasts casts) {
  NumericsProfile profile = FindNumericsProfile(name).value();
  profile.gated_norm = casts;
  return profile;
}

// Relative to the result: the mean of n squares within (n / 16 + 6) * 2^-24, halved by the square root; then some ten
// operations. In bf16 2^-8 for each rounding: three, or one.
TEST(GatedRmsNorm, MatchesFp64) {
  for (const char* name : {"fp32", "hf", "hf-torch"}) {
    for (const GatedNormCasts casts : {GatedNormCasts::kThree, GatedNormCasts::kTwo, GatedNormCasts::kOne}) {
      for (const int64_t dim : {1, 16, 24, 40, 128, 192}) {
        const NumericsProfile profile = ProfileWith(name, casts);
        const bool bf16 = profile.activations == DType::kBF16;
        ThreadPool pool(2);
        ThreadScratch scratch(2);
        const CpuContext ctx = {profile, pool, scratch};
        constexpr int64_t kRows = 20;
        const int64_t width = 3 * dim;
        Matrix x(kRows, width), gate(kRows, width), weight(1, dim), out(kRows, width);
        x.Fill(1, bf16, 2.0f);
        gate.Fill(2, bf16, 3.0f);
        weight.Fill(3, bf16);
        CpuGatedRmsNorm(ctx, x.view(), gate.view(), weight.row(0), kEps, dim, out.view());
        EXPECT_EQ(out.Unwritten() + out.TouchedOutside(), 0);
        int64_t rounded = 0;
        for (int64_t r = 0; r < kRows; ++r) {
          for (int64_t c = 0; c < width; ++c) {
            double sum = 0.0;
            for (int64_t d = 0; d < dim; ++d) sum += std::pow(x.at(r, c / dim * dim + d), 2);
            const double z = gate.at(r, c);
            const double want = x.at(r, c) / std::sqrt(sum / static_cast<double>(dim) + kEps) * weight.row(0)[c % dim] *
                                z / (1.0 + std::exp(-z));
            double bound = (static_cast<double>(dim) / 32 + 3 + 10) * testing::kUnitF32;
            const int roundings = casts == GatedNormCasts::kThree ? 3 : casts == GatedNormCasts::kTwo ? 2 : 1;
            if (bf16) bound += roundings * testing::kUnitBf16 * 1.02;
            EXPECT_TRUE(std::abs(out.at(r, c) - want) <= bound * std::abs(want) + 1e-37)
                << out.at(r, c) << ", want " << want;
            rounded += out.at(r, c) == RoundBf16(out.at(r, c));
          }
        }
        if (bf16) {
          EXPECT_EQ(rounded, kRows * width);
        }
        // In place.
        CpuGatedRmsNorm(ctx, x.view(), gate.view(), weight.row(0), kEps, dim, x.view());
        EXPECT_EQ(DifferingRows(x, 0, out, 0, kRows), 0);
      }
    }
  }
}

TEST(GatedRmsNorm, NoBatchOrInstructionSetShowsInTheBits) {
  for (const char* name : {"fp32", "hf", "hf-autocast", "hf-torch"}) {
    TestContext context(name, 3);
    Matrix x(60, 400), gate(60, 400), weight(1, 200), all(60, 400);
    x.Fill(4, context.bf16());
    gate.Fill(5, context.bf16());
    weight.Fill(6, context.bf16());
    CpuGatedRmsNorm(context.get(), x.view(), gate.view(), weight.row(0), kEps, 200, all.view());
    ForEachTarget([&] {
      TestContext single(name);
      Matrix rows(60, 400);
      for (int64_t r = 0; r < 60; ++r) {
        CpuGatedRmsNorm(single.get(), x.view().slice(r, 1), gate.view().slice(r, 1), weight.row(0), kEps, 200,
                        rows.view().slice(r, 1));
      }
      EXPECT_EQ(DifferingRows(all, 0, rows, 0, 60), 0);
    });
  }
}

}  // namespace
}  // namespace lockstep

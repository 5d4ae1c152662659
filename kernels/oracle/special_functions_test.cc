// The emulated special functions against a GPU's results (tests/data/gpu_bits): chosen arguments for all of them, and
// arguments as the model has them. oracle_gpu_test.cu tries far more on a GPU.
#include "kernels/oracle/special_functions.h"

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

struct Named {
  const char* name;
  Function function;
};

// In the order of the recording.
const std::array<Named, 9> kFunctions = {{{"ex2.approx.ftz", Exp2Approx},
                                          {"rcp.approx.ftz", ReciprocalApprox},
                                          {"rsqrt.approx.ftz", RsqrtApprox},
                                          {"div.full of 1", [](float x) { return DivFull(1.0f, x); }},
                                          {"expf", Exp},
                                          {"logf", Log},
                                          {"log1pf", Log1p},
                                          {"rsqrtf", Rsqrt},
                                          {"sqrt.approx.ftz", SqrtApprox}}};

// Zeros, subnormals, infinities, NaN, ends of ranges, and arguments of every exponent.
TEST(SpecialFunctions, HaveTheGpusBits) {
  const std::vector<float> x = ReadData<float>("gpu_bits/special_x.f32");
  const std::vector<float> y = ReadData<float>("gpu_bits/special_y.f32");
  ASSERT_EQ(y.size(), x.size() * kFunctions.size());
  ASSERT_GE(x.size(), 1000u);
  for (size_t f = 0; f < kFunctions.size(); ++f) {
    std::vector<float> got, want;
    for (size_t i = 0; i < x.size(); ++i) {
      got.push_back(kFunctions[f].function(x[i]));
      want.push_back(y[i * kFunctions.size() + f]);
    }
    EXPECT_EQ(Differing(got, want), 0) << kFunctions[f].name << ", of " << x.size();
  }
}

// What the C library has instead: right to the last bit more often than not, and so useless here.
TEST(SpecialFunctions, AreNotTheCLibrarys) {
  const std::vector<float> x = ReadData<float>("gpu_bits/special_x.f32");
  const std::vector<float> y = ReadData<float>("gpu_bits/special_y.f32");
  const std::array<Named, 9> library = {{{"exp2", [](float v) { return std::exp2(v); }},
                                         {"1 / x", [](float v) { return 1.0f / v; }},
                                         {"1 / sqrt", [](float v) { return 1.0f / std::sqrt(v); }},
                                         {"1 / x", [](float v) { return 1.0f / v; }},
                                         {"exp", [](float v) { return std::exp(v); }},
                                         {"log", [](float v) { return std::log(v); }},
                                         {"log1p", [](float v) { return std::log1p(v); }},
                                         {"1 / sqrt", [](float v) { return 1.0f / std::sqrt(v); }},
                                         {"sqrt", [](float v) { return std::sqrt(v); }}}};
  for (size_t f = 0; f < library.size(); ++f) {
    int differing = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const float want = y[i * library.size() + f];
      if (!std::isnormal(want)) continue;
      const float got = library[f].function(x[i]);
      // At most 2 units in the last place apart: the same function.
      EXPECT_NEAR(got, want, 2.01 * std::ldexp(std::abs(static_cast<double>(want)), -23)) << library[f].name << x[i];
      differing += !SameBits(got, want);
    }
    EXPECT_GT(differing, 10) << library[f].name;
  }
}

// exp2(G_i - G_j) of a chunk, as fla's kernel computed it.
TEST(SpecialFunctions, Exp2OfAChunksDecays) {
  const std::vector<float> decay = ReadData<float>("gpu_bits/gdn_decay.f32");
  const std::vector<float> tile = ReadData<float>("gpu_bits/gdn_exp2_tile.f32");
  std::vector<float> got, want;
  int library = 0;
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j <= i; ++j) {
      got.push_back(Exp2Approx(decay[i] - decay[j]));
      want.push_back(tile[i * 64 + j]);
      library += !SameBits(static_cast<float>(std::exp2(static_cast<double>(decay[i] - decay[j]))), want.back());
    }
  }
  EXPECT_EQ(Differing(got, want), 0);
  EXPECT_GT(library, 500) << "of " << want.size() << ": correctly rounded is not what the GPU has";
}

TEST(SpecialFunctions, DivFullScalesTheDenominator) {
  EXPECT_EQ(DivFull(3.0f, 0.25f), 12.0f);
  EXPECT_EQ(DivFull(0x1p127f, 0x1p127f), 1.0f);        // a plain reciprocal would be flushed to zero
  EXPECT_EQ(DivFull(0x1p-140f, 0x1p-130f), 0x1p-10f);  // and here it would be infinite
}

}  // namespace
}  // namespace lockstep::oracle

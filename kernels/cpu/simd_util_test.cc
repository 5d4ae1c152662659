// bf16 rounding, the 16-lane sum and exp, on every instruction set of this machine.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_util_test.cc"
// clang-format off
#include "hwy/foreach_target.h"
// clang-format on

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"
#include "kernels/cpu/test_util.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

void RoundArray(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) StoreUpTo(RoundBf16(LoadUpTo(in + i, count - i)), out + i, count - i);
}
void ExpArray(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) StoreUpTo(Exp(LoadUpTo(in + i, count - i)), out + i, count - i);
}
void SiluArray(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) StoreUpTo(Silu(LoadUpTo(in + i, count - i)), out + i, count - i);
}
float DotArrays(const float* a, const float* b, int64_t count) {
  return Dot16(a, b, count);
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
namespace {

HWY_EXPORT(RoundArray);
HWY_EXPORT(ExpArray);
HWY_EXPORT(SiluArray);
HWY_EXPORT(DotArrays);

using testing::ForEachTarget;

// Round to nearest even by comparing distances between the two neighbouring bf16 values, in exact arithmetic: none of
// the code under test.
uint16_t NearestBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t below = bits >> 16;
  if (std::isnan(value)) return 0x7FC0;
  if ((bits & 0xFFFFu) == 0) return below;
  const uint16_t above = below + 1;  // away from zero, same sign
  // As if exponents went on above the largest finite bf16, whose successor is 2^128.
  const auto magnitude = [](uint16_t b) {
    return (b & 0x7FFF) == 0x7F80 ? 0x1p128 : std::abs(static_cast<double>(Bf16ToF32(b)));
  };
  const double exact = std::abs(static_cast<double>(value));
  const double to_below = exact - magnitude(below);
  const double to_above = magnitude(above) - exact;
  if (to_below != to_above) return to_below < to_above ? below : above;
  return (below & 1) == 0 ? below : above;
}

// Every sign and exponent with mantissas around each kind of rounding: exact, just above, just below and on the tie,
// even and odd, and carries.
std::vector<float> RoundingCases() {
  std::vector<float> cases;
  for (uint32_t upper = 0; upper < 0x10000u; ++upper) {
    for (const uint32_t lower : {0x0000u, 0x0001u, 0x1234u, 0x7FFFu, 0x8000u, 0x8001u, 0xC000u, 0xFFFFu}) {
      cases.push_back(std::bit_cast<float>(upper << 16 | lower));
    }
  }
  return cases;
}

TEST(RoundBf16, ScalarIsNearestEvenForEveryExponentTieInfinityAndNan) {
  for (const float value : RoundingCases()) {
    ASSERT_EQ(F32ToBf16(value), NearestBf16(value)) << std::hex << std::bit_cast<uint32_t>(value);
  }
  EXPECT_EQ(F32ToBf16(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(F32ToBf16(-std::numeric_limits<float>::infinity()), 0xFF80);
}

TEST(RoundBf16, VectorIsTheScalarOnEveryTarget) {
  const std::vector<float> cases = RoundingCases();
  ForEachTarget([&] {
    std::vector<float> out(cases.size());
    HWY_DYNAMIC_DISPATCH(RoundArray)(cases.data(), out.data(), static_cast<int64_t>(cases.size()));
    for (size_t i = 0; i < cases.size(); ++i) {
      ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), static_cast<uint32_t>(F32ToBf16(cases[i])) << 16)
          << std::hex << std::bit_cast<uint32_t>(cases[i]);
    }
  });
}

TEST(FloatBits, F16IsExactForAllValues) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 0x1F);
    const double mantissa = bits & 0x3FF;
    const float value = F16ToF32(static_cast<uint16_t>(bits));
    EXPECT_EQ(std::signbit(value), (bits & 0x8000) != 0);
    if (exponent == 31) {
      EXPECT_EQ(mantissa == 0, std::isinf(value));
      EXPECT_EQ(mantissa != 0, std::isnan(value));
      continue;
    }
    const double expected = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(std::abs(static_cast<double>(value)), expected) << bits;
  }
}

// |result - exact| in units of the last place of fp32 at `exact`.
double UlpError(float result, double exact) {
  if (exact >= 0x1.ffffffp127) return std::isinf(result) ? 0 : std::numeric_limits<double>::infinity();
  const int exponent = exact == 0 ? -149 : std::max(std::ilogb(exact) - 23, -149);
  return std::abs(static_cast<double>(result) - exact) / std::ldexp(1.0, exponent);
}

TEST(Exp, NearestIn98Of100OverTheWholeRangeAndTheSameOnEveryTarget) {
  std::vector<float> inputs;
  for (uint32_t bits = 0; bits < std::bit_cast<uint32_t>(110.0f); bits += 1009) {
    inputs.push_back(std::bit_cast<float>(bits));
    inputs.push_back(-std::bit_cast<float>(bits));
  }
  std::vector<float> first;
  ForEachTarget([&] {
    std::vector<float> out(inputs.size());
    HWY_DYNAMIC_DISPATCH(ExpArray)(inputs.data(), out.data(), static_cast<int64_t>(inputs.size()));
    int64_t nearest = 0;
    double worst = 0;
    double worst_subnormal = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const double exact = std::exp(static_cast<double>(inputs[i]));
      double& kind = exact < 0x1p-126 ? worst_subnormal : worst;
      kind = std::max(kind, UlpError(out[i], exact));
      nearest += out[i] == static_cast<float>(exact);
    }
    EXPECT_LE(worst, 0.58);
    EXPECT_LE(worst_subnormal, 0.8) << "rounded twice";
    EXPECT_GE(static_cast<double>(nearest), 0.98 * static_cast<double>(inputs.size()));
    ::testing::Test::RecordProperty("max_ulp", std::to_string(worst));
    if (first.empty()) first = out;
    EXPECT_EQ(std::memcmp(first.data(), out.data(), out.size() * sizeof(float)), 0);
  });
}

TEST(Exp, Limits) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> inputs = {inf,    -inf,     std::nanf(""), 0.0f,  -0.0f,  88.72283f,
                                     88.73f, -103.97f, -104.5f,       1e30f, -1e30f, -88.0f};
  ForEachTarget([&] {
    std::vector<float> out(inputs.size());
    HWY_DYNAMIC_DISPATCH(ExpArray)(inputs.data(), out.data(), static_cast<int64_t>(inputs.size()));
    EXPECT_EQ(out[0], inf);
    EXPECT_EQ(out[1], 0.0f);
    EXPECT_TRUE(std::isnan(out[2]));
    EXPECT_EQ(out[3], 1.0f);
    EXPECT_EQ(out[4], 1.0f);
    EXPECT_TRUE(std::isfinite(out[5]));
    EXPECT_EQ(out[6], inf);
    EXPECT_EQ(out[7], std::numeric_limits<float>::denorm_min());
    EXPECT_EQ(out[8], 0.0f);
    EXPECT_EQ(out[9], inf);
    EXPECT_EQ(out[10], 0.0f);
    EXPECT_GT(out[11], 0.0f);
    EXPECT_LT(out[11], std::numeric_limits<float>::min());
  });
}

TEST(Silu, LimitsAndRelativeError) {
  std::vector<float> inputs;
  for (float x = -80; x < 80; x += 0.0137f) inputs.push_back(x);
  const size_t grid = inputs.size();
  inputs.insert(inputs.end(), {-1000.0f, 1000.0f, std::nanf("")});
  ForEachTarget([&] {
    std::vector<float> out(inputs.size());
    HWY_DYNAMIC_DISPATCH(SiluArray)(inputs.data(), out.data(), static_cast<int64_t>(inputs.size()));
    for (size_t i = 0; i < grid; ++i) {
      const double x = inputs[i];
      const double exact = x / (1 + std::exp(-x));
      // exp within 2 units, one rounding in the sum, one in the quotient.
      ASSERT_LE(std::abs(out[i] - exact), 4 * testing::kUnitF32 * std::abs(exact)) << x;
    }
    EXPECT_EQ(out[grid], 0.0f);
    EXPECT_EQ(out[grid + 1], 1000.0f);
    EXPECT_TRUE(std::isnan(out[grid + 2]));
  });
}

TEST(Dot16, SixteenLanesThenATreeOnEveryTarget) {
  for (const int64_t count : {0, 1, 4, 15, 16, 17, 31, 96, 257, 1000}) {
    testing::Matrix a(1, count);
    testing::Matrix b(1, count);
    a.Fill(1, false);
    b.Fill(2, false);
    float lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i % 16] = std::fma(a.at(0, i), b.at(0, i), lanes[i % 16]);
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    ForEachTarget([&] { EXPECT_EQ(HWY_DYNAMIC_DISPATCH(DotArrays)(a.row(0), b.row(0), count), lanes[0]) << count; });
  }
}

}  // namespace
}  // namespace lockstep
#endif  // HWY_ONCE

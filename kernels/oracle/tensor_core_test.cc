// The integer tensor core against steps recorded on a GPU (tests/data/gpu_bits) and against the same arithmetic written
// with fp64, which is slow, plain, and easy to change into a wrong one.
#include "kernels/oracle/tensor_core.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

enum class Rounding { kTowardZero, kNearest };

// One step in fp64, for finite operands.
struct SlowStep {
  int fraction_bits = 25;
  Rounding rounding = Rounding::kTowardZero;
  bool zeros_align = false;  // a zero factor taken for one of exponent -126

  std::optional<int> Exponent(float x) const {
    if (x == 0.0f && !zeros_align) return std::nullopt;
    return x == 0.0f ? -126 : std::max(-126, std::ilogb(x));
  }

  float operator()(float accumulator, const std::vector<float>& a, const std::vector<float>& b) const {
    std::optional<int> top = Exponent(accumulator);
    for (size_t i = 0; i < a.size(); ++i) {
      const std::optional<int> ea = Exponent(a[i]), eb = Exponent(b[i]);
      if (ea && eb) top = std::max(top.value_or(*ea + *eb), *ea + *eb);
    }
    if (!top) return 0.0f;
    double sum = std::trunc(std::ldexp(static_cast<double>(accumulator), fraction_bits - *top));
    for (size_t i = 0; i < a.size(); ++i) {
      sum += std::trunc(std::ldexp(static_cast<double>(a[i]) * b[i], fraction_bits - *top));
    }
    if (sum == 0.0) return 0.0f;
    const double value = std::ldexp(sum, *top - fraction_bits);
    if (rounding == Rounding::kNearest) return static_cast<float>(value);
    const int last_bit = std::max(std::ilogb(value), -126) - 23;
    return static_cast<float>(std::ldexp(std::trunc(std::ldexp(value, -last_bit)), last_bit));
  }
};

bool Finite(const std::vector<float>& values) {
  return std::ranges::all_of(values, [](float v) { return std::isfinite(v); });
}

std::vector<Factor> Factors(const std::vector<float>& values, Factor (*make)(float) = MakeFactor) {
  std::vector<Factor> factors(values.size());
  std::ranges::transform(values, factors.begin(), make);
  return factors;
}

// One product of a 16-row and an 8-column operand, one step deep, is 128 steps.
struct RecordedStep {
  int kind;
  float accumulator;
  std::vector<float> a;
  std::vector<float> b;
  float result;
};

constexpr int kKinds = 10;
enum Kind {
  kSubnormalResults = 3,
  kSubnormalFactors = 4,
  kOverflow = 5,
  kZerosBesideHuge = 6,
  kCancelling = 7,
  kSpecials = 8
};

std::vector<float> ReadFactors(const std::string& name, bool bf16) {
  if (!bf16) return ReadData<float>("gpu_bits/" + name + ".f32");
  std::vector<float> values;
  for (const uint16_t bits : ReadData<uint16_t>("gpu_bits/" + name + ".bf16")) values.push_back(Bf16ToF32(bits));
  return values;
}

std::vector<RecordedStep> ReadSteps(bool bf16) {
  const std::string prefix = bf16 ? "step_bf16_" : "step_tf32_";
  const int depth = bf16 ? kBf16Group : kTf32Group;
  const std::vector<float> a = ReadFactors(prefix + "a", bf16), b = ReadFactors(prefix + "b", bf16);
  const std::vector<float> c = ReadFactors(prefix + "c", false), d = ReadFactors(prefix + "d", false);
  EXPECT_EQ(c.size() % (kKinds * 128), 0u);
  EXPECT_EQ(a.size(), c.size() / 8 * depth);
  EXPECT_EQ(b.size(), c.size() / 16 * depth);
  const int tiles = static_cast<int>(c.size()) / 128;
  std::vector<RecordedStep> steps;
  for (int i = 0; i < static_cast<int>(c.size()); ++i) {
    const int tile = i / 128;
    const auto row = a.begin() + (tile * 16 + i % 128 / 8) * depth;
    const auto column = b.begin() + (tile * 8 + i % 8) * depth;
    steps.push_back({.kind = tile / (tiles / kKinds),
                     .accumulator = c[i],
                     .a = {row, row + depth},
                     .b = {column, column + depth},
                     .result = d[i]});
  }
  return steps;
}

float CutToTf32(float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0x1FFFu);
}

// How many recorded steps of finite operands a slow model gets wrong. Operands are cut to tf32 if asked for.
int SlowDiffering(const std::vector<RecordedStep>& steps, const SlowStep& model, bool cut) {
  int count = 0;
  for (RecordedStep step : steps) {
    if (!Finite(step.a) || !Finite(step.b) || !std::isfinite(step.accumulator)) continue;
    if (cut) {
      std::ranges::transform(step.a, step.a.begin(), CutToTf32);
      std::ranges::transform(step.b, step.b.begin(), CutToTf32);
    }
    count += !SameBits(model(step.accumulator, step.a, step.b), step.result);
  }
  return count;
}

TEST(RecordedSteps, EveryBitIsTheGpus) {
  for (const bool bf16 : {true, false}) {
    std::array<int, kKinds> infinite = {}, nan = {}, subnormal = {}, zero = {};
    int differing = 0;
    const std::vector<RecordedStep> steps = ReadSteps(bf16);
    for (const RecordedStep& s : steps) {
      const auto make = bf16 ? MakeFactor : MakeTf32Factor;
      const float got = FusedStep(s.accumulator, Factors(s.a, make), Factors(s.b, make));
      if (!SameBits(got, s.result) && ++differing <= 3) {
        ADD_FAILURE() << "kind " << s.kind << ": " << got << ", the GPU has " << s.result;
      }
      infinite[s.kind] += std::isinf(s.result);
      nan[s.kind] += std::isnan(s.result);
      subnormal[s.kind] += std::fpclassify(s.result) == FP_SUBNORMAL;
      zero[s.kind] += s.result == 0.0f;
    }
    EXPECT_EQ(differing, 0) << "of " << steps.size();
    // The kinds hold what they are there for.
    EXPECT_GT(subnormal[kSubnormalResults], 10);
    EXPECT_GT(infinite[kOverflow], 10);
    EXPECT_GT(zero[kCancelling], 10);
    EXPECT_GT(infinite[kSpecials], 20);
    EXPECT_GT(nan[kSpecials], 50);
  }
}

TEST(RecordedSteps, TellTheRightModelFromWrongOnes) {
  for (const bool bf16 : {true, false}) {
    const std::vector<RecordedStep> steps = ReadSteps(bf16);
    EXPECT_EQ(SlowDiffering(steps, {}, !bf16), 0);
    EXPECT_GT(SlowDiffering(steps, {.fraction_bits = 24}, !bf16), 200);
    EXPECT_GT(SlowDiffering(steps, {.fraction_bits = 26}, !bf16), 200);
    EXPECT_GT(SlowDiffering(steps, {.rounding = Rounding::kNearest}, !bf16), 500);
    EXPECT_GT(SlowDiffering(steps, {.zeros_align = true}, !bf16), 300);
  }
  EXPECT_GT(SlowDiffering(ReadSteps(false), {}, false), 1000) << "tf32 operands not cut";
}

// Two half steps instead of one, as older chips take.
TEST(RecordedSteps, TellGroupsApart) {
  for (const bool bf16 : {true, false}) {
    int differing = 0;
    for (const RecordedStep& s : ReadSteps(bf16)) {
      const auto make = bf16 ? MakeFactor : MakeTf32Factor;
      const int half = static_cast<int>(s.a.size()) / 2;
      differing += !SameBits(Chain(s.accumulator, Factors(s.a, make), Factors(s.b, make), half), s.result);
    }
    EXPECT_GT(differing, 300);
  }
}

class RandomSteps : public ::testing::Test {
 protected:
  // A float with an exponent of [low, high], below -126 a subnormal; one in `zeros` is a zero of either sign.
  float Draw(int low, int high, int zeros, uint32_t mask) {
    const uint32_t bits = static_cast<uint32_t>(random_());
    const uint32_t sign = bits & 0x80000000u;
    if (zeros > 0 && random_() % zeros == 0) return std::bit_cast<float>(sign);
    const int exponent = low + static_cast<int>(random_() % static_cast<uint32_t>(high - low + 1));
    const uint32_t field = exponent < -126 ? 0u : static_cast<uint32_t>(exponent + 127);
    return std::bit_cast<float>((sign | field << 23 | (bits & 0x7FFFFFu)) & mask);
  }

  std::mt19937 random_{20};
};

TEST_F(RandomSteps, EqualTheSlowOnes) {
  struct Range {
    int low, high, zeros;
    int accumulator_low, accumulator_high;
  };
  const Range ranges[] = {{-4, 4, 0, -4, 8},        {-20, 20, 4, -20, 20},     {-127, 127, 8, -127, 127},
                          {-127, 0, 3, -127, -100}, {60, 63, 5, 100, 127},     {-80, -60, 2, -127, -110},
                          {-127, -120, 2, -3, 3},   {-64, -60, 16, -127, -120}};
  for (const uint32_t mask : {0xFFFF0000u, 0xFFFFE000u}) {
    for (const Range& range : ranges) {
      for (int i = 0; i < 4000; ++i) {
        std::vector<float> a(mask == 0xFFFF0000u ? kBf16Group : kTf32Group), b(a.size());
        for (float& x : a) x = Draw(range.low, range.high, range.zeros, mask);
        for (float& x : b) x = Draw(range.low, range.high, range.zeros, mask);
        const float c = Draw(range.accumulator_low, range.accumulator_high, 3, ~0u);
        const float got = FusedStep(c, Factors(a), Factors(b));
        ASSERT_TRUE(SameBits(got, SlowStep{}(c, a, b))) << got << " not " << SlowStep{}(c, a, b);
      }
    }
  }
}

TEST_F(RandomSteps, OrderMattersBetweenGroupsOnly) {
  int in_group = 0, between_groups = 0;
  for (int i = 0; i < 1000; ++i) {
    std::vector<float> a(64), b(64);
    for (float& x : a) x = Draw(-4, 4, 0, 0xFFFF0000u);
    for (float& x : b) x = Draw(-4, 4, 0, 0xFFFF0000u);
    const float sum = Chain(0.0f, Factors(a), Factors(b));
    for (int begin = 0; begin < 64; begin += kBf16Group) {
      std::reverse(a.begin() + begin, a.begin() + begin + kBf16Group);
      std::reverse(b.begin() + begin, b.begin() + begin + kBf16Group);
    }
    in_group += !SameBits(sum, Chain(0.0f, Factors(a), Factors(b)));
    std::ranges::reverse(a);
    std::ranges::reverse(b);
    between_groups += !SameBits(sum, Chain(0.0f, Factors(a), Factors(b)));
  }
  EXPECT_EQ(in_group, 0);
  EXPECT_GT(between_groups, 500);
}

TEST_F(RandomSteps, AShortLastGroupIsOneOfZeros) {
  for (int depth = 1; depth < 40; ++depth) {
    std::vector<float> a(depth), b(depth);
    for (float& x : a) x = Draw(-4, 4, 0, 0xFFFF0000u);
    for (float& x : b) x = Draw(-4, 4, 0, 0xFFFF0000u);
    const float sum = Chain(0.5f, Factors(a), Factors(b));
    a.resize(48, 0.0f);
    b.resize(48, 0.0f);
    EXPECT_TRUE(SameBits(sum, Chain(0.5f, Factors(a), Factors(b)))) << depth;
  }
}

TEST(FactorMatrix, RowsAndChains) {
  const FactorMatrix b = FactorMatrix::Of(3, 16, [](int r, int k) { return static_cast<float>(r + 1) * (k == 2); });
  const FactorMatrix a = FactorMatrix::Of(1, 16, [](int, int k) { return static_cast<float>(k); });
  std::vector<float> sums = {10.0f, 20.0f, 30.0f};
  ChainRow(a.Row(0), b, sums);
  EXPECT_EQ(sums, (std::vector<float>{12.0f, 24.0f, 36.0f}));
  EXPECT_EQ(b.rows(), 3);
  EXPECT_EQ(b.depth(), 16);
}

TEST(EvenThenOdd, IsAPermutation) {
  std::vector<int> seen;
  for (int i = 0; i < 16; ++i) seen.push_back(EvenThenOdd(i));
  EXPECT_EQ(seen, (std::vector<int>{0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15}));
}

}  // namespace
}  // namespace lockstep::oracle

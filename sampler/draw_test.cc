// The generator's known answers, and that draws with neighbouring keys are independent.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "sampler/chi_square.h"
#include "sampler/philox.h"
#include "sampler/sampler.h"

namespace lockstep {
namespace {

// The three vectors for philox4x32-10 of Random123's kat_vectors.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Computed by a Python program written from sampler/README.md: these must never change, or seeds lose their meaning.
TEST(DrawTest, KnownAnswers) {
  EXPECT_EQ(PromptHash({}), 0u);
  EXPECT_EQ(PromptHash(std::vector<int32_t>{0}), 0xe4d971771b652c20u);
  EXPECT_EQ(PromptHash(std::vector<int32_t>{1, 2, 3}), 0xb9cf2d14aa90b94cu);
  EXPECT_EQ(PromptHash(std::vector<int32_t>{3, 2, 1}), 0xc0c75cb64f28df7eu);
  EXPECT_EQ(PromptHash(std::vector<int32_t>{100277, 0, 0}), 0x69eaa5bdf3fe3d3bu);

  EXPECT_EQ(UniformDraw({}), 0x1.989fa35785a72p-2);
  EXPECT_EQ(UniformDraw({.seed = 1, .prompt_hash = 2, .sample_index = 3, .position = 4}), 0x1.4da67b296a10bp-1);
  EXPECT_EQ(
      UniformDraw({.seed = 0x123456789ABCDEF0, .prompt_hash = 0xb9cf2d14aa90b94c, .sample_index = 5, .position = 1000}),
      0x1.5d27200c696e1p-1);
}

TEST(DrawTest, SameKeySameDraw) {
  const DrawKey key{.seed = 7, .prompt_hash = 11, .sample_index = 3, .position = 12};
  EXPECT_EQ(UniformDraw(key), UniformDraw(key));
}

TEST(DrawTest, EveryBitOfTheKeyMatters) {
  const DrawKey key{.seed = 0x0123456789ABCDEF, .prompt_hash = 0xFEDCBA9876543210, .sample_index = 9, .position = 77};
  const double drawn = UniformDraw(key);
  for (int bit = 0; bit < 64; ++bit) {
    DrawKey other = key;
    other.seed ^= uint64_t{1} << bit;
    EXPECT_NE(UniformDraw(other), drawn) << "seed bit " << bit;
    other = key;
    other.prompt_hash ^= uint64_t{1} << bit;
    EXPECT_NE(UniformDraw(other), drawn) << "prompt_hash bit " << bit;
  }
  for (int bit = 0; bit < 32; ++bit) {
    DrawKey other = key;
    other.sample_index ^= uint32_t{1} << bit;
    EXPECT_NE(UniformDraw(other), drawn) << "sample_index bit " << bit;
    other = key;
    other.position ^= uint32_t{1} << bit;
    EXPECT_NE(UniformDraw(other), drawn) << "position bit " << bit;
  }
}

constexpr int64_t kDraws = 1 << 18;
constexpr double kLevel = 1e-6;

using Stream = std::function<double(uint32_t)>;

// Smallest p-value of: uniformity (1,024 cells); pairs of successive draws (32 x 32 cells); serial correlation at lags
// 1, 2, 3 and 7.
double SmallestPValue(const Stream& stream) {
  std::vector<double> u(kDraws);
  for (int64_t i = 0; i < kDraws; ++i) u[i] = stream(static_cast<uint32_t>(i));
  std::vector<int64_t> cells(1024, 0);
  std::vector<int64_t> pairs(1024, 0);
  for (int64_t i = 0; i < kDraws; ++i) ++cells[static_cast<size_t>(u[i] * 1024)];
  for (int64_t i = 0; i + 1 < kDraws; i += 2) {
    ++pairs[static_cast<size_t>(u[i] * 32) * 32 + static_cast<size_t>(u[i + 1] * 32)];
  }
  const std::vector<double> uniform(1024, 1.0 / 1024);
  double smallest = std::min(ChiSquarePValue(cells, uniform), ChiSquarePValue(pairs, uniform));
  for (const int lag : {1, 2, 3, 7}) {
    double sum = 0;
    for (int64_t i = 0; i + lag < kDraws; ++i) sum += (u[i] - 0.5) * (u[i + lag] - 0.5);
    // Of independent uniforms: mean 0, variance 1/144 a term.
    const double z = sum * 12 / std::sqrt(static_cast<double>(kDraws - lag));
    smallest = std::min(smallest, std::erfc(std::abs(z) / std::sqrt(2.0)));
  }
  return smallest;
}

TEST(DrawTest, AlongEveryPartOfTheKeyDrawsAreIndependent) {
  EXPECT_GT(SmallestPValue([](uint32_t i) { return UniformDraw({.seed = 5, .prompt_hash = 6, .position = i}); }),
            kLevel);
  EXPECT_GT(SmallestPValue([](uint32_t i) { return UniformDraw({.seed = 5, .prompt_hash = 6, .sample_index = i}); }),
            kLevel);
  EXPECT_GT(SmallestPValue([](uint32_t i) { return UniformDraw({.seed = i, .prompt_hash = 6}); }), kLevel);
  EXPECT_GT(SmallestPValue([](uint32_t i) {
              return UniformDraw({.seed = 5, .prompt_hash = PromptHash(std::vector<int32_t>{1, static_cast<int>(i)})});
            }),
            kLevel);
  // The order in which a batch of 8 samples draws: samples inside, positions outside.
  EXPECT_GT(SmallestPValue([](uint32_t i) {
              return UniformDraw({.seed = 5, .prompt_hash = 6, .sample_index = i % 8, .position = i / 8});
            }),
            kLevel);
}

TEST(DrawTest, TheIndependenceTestRejectsBrokenKeys) {
  const auto draw = [](uint32_t sample, uint32_t position) {
    return UniformDraw({.seed = 5, .prompt_hash = 6, .sample_index = sample, .position = position});
  };
  EXPECT_LT(SmallestPValue([&](uint32_t) { return draw(0, 0); }), kLevel) << "position ignored";
  EXPECT_LT(SmallestPValue([&](uint32_t i) { return draw(0, i / 8); }), kLevel) << "sample index ignored";
  EXPECT_LT(SmallestPValue([&](uint32_t i) { return draw(0, i % 8 + i / 8); }), kLevel)
      << "sample index added to the position";
  EXPECT_LT(SmallestPValue([&](uint32_t i) { return std::fmod(draw(0, 0) + i * 0.618033988749895, 1.0); }), kLevel)
      << "a lattice";
  EXPECT_LT(SmallestPValue([&](uint32_t i) { return draw(0, i) * (1 - 1e-2); }), kLevel) << "a scale off by 1%";
}

TEST(DrawTest, StaysInsideTheOpenInterval) {
  for (uint32_t i = 0; i < 100000; ++i) {
    const double u = UniformDraw({.seed = i});
    ASSERT_GT(u, 0.0);
    ASSERT_LT(u, 1.0);
    ASSERT_EQ(std::fmod(u * 0x1p53, 2.0), 1.0);
  }
}

}  // namespace
}  // namespace lockstep

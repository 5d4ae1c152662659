// The vector passes against plain loops, and the same bits on every instruction set this machine has.
#include "sampler/row_ops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "sampler/logsumexp.h"
#include "sampler/mass.h"

namespace lockstep {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RandomRow(std::mt19937& random, int64_t size, float deviation) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> row(size);
  for (float& x : row) x = random() % 50 == 0 ? -kInf : normal(random);
  row[random() % size] = 1.0f;
  return row;
}

// Around the vector widths, the block of masses, and past it.
const std::vector<int64_t> kSizes = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 1023, 1024, 1025, 5001};

TEST(MassTest, RoundsToMultiplesOf2ToTheMinus44) {
  EXPECT_EQ(Mass(1.0f), uint64_t{1} << 44);
  EXPECT_EQ(Mass(0.0f), 0u);
  EXPECT_EQ(Mass(0x1p-44f), 1u);
  EXPECT_EQ(Mass(0x1p-45f), 0u);    // tie to even
  EXPECT_EQ(Mass(0x1.8p-44f), 2u);  // tie to even
  EXPECT_EQ(Mass(0x1.000002p-45f), 1u);
  EXPECT_EQ(Mass(0x1p-126f), 0u);
}

TEST(TokenKeyTest, OrdersByLogitThenId) {
  const std::vector<float> descending = {kInf, 3e38f, 2.0f, 1.0f, 1e-40f, 0.0f, -1e-40f, -1.0f, -3e38f, -kInf};
  for (size_t i = 0; i + 1 < descending.size(); ++i) {
    EXPECT_LT(MakeTokenKey(descending[i], 9), MakeTokenKey(descending[i + 1], 0)) << descending[i];
  }
  EXPECT_LT(MakeTokenKey(1.5f, 3), MakeTokenKey(1.5f, 4));
  EXPECT_EQ(MakeTokenKey(0.0f, 3), MakeTokenKey(-0.0f, 3));
  for (const float x : descending) {
    EXPECT_EQ(KeyLogit(MakeTokenKey(x, 262143)), x);
    EXPECT_EQ(KeyToken(MakeTokenKey(x, 262143)), 262143);
  }
}

TEST(FindRangeTest, MaximumAndValidity) {
  std::mt19937 random(1);
  for (const int64_t size : kSizes) {
    std::vector<float> row = RandomRow(random, size, 3);
    EXPECT_EQ(FindRange(row).max, *std::max_element(row.begin(), row.end()));
    EXPECT_TRUE(FindRange(row).valid);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(), kInf}) {
      for (const int64_t at : {int64_t{0}, size / 2, size - 1}) {
        std::vector<float> broken = row;
        broken[at] = bad;
        EXPECT_FALSE(FindRange(broken).valid) << size << " " << at << " " << bad;
      }
    }
    std::fill(row.begin(), row.end(), -kInf);
    EXPECT_TRUE(FindRange(row).valid);
    EXPECT_EQ(FindRange(row).max, -kInf);
  }
}

TEST(WeighRowTest, WeightsAndMasses) {
  std::mt19937 random(2);
  for (const int64_t size : kSizes) {
    const std::vector<float> row = RandomRow(random, size, 20);
    const float max = FindRange(row).max;
    std::vector<float> weights(size);
    std::vector<uint64_t> blocks(MassBlocks(size));
    const uint64_t total = WeighRow(row, max, weights.data(), blocks.data());
    uint64_t sum = 0;
    std::vector<uint64_t> expected(blocks.size(), 0);
    for (int64_t i = 0; i < size; ++i) {
      const float x = row[i] - max;
      const double exact = x < -87 ? 0.0 : std::exp(static_cast<double>(x));
      ASSERT_NEAR(weights[i], exact, exact * 0x1p-23) << x;
      expected[i / kMassBlock] += Mass(weights[i]);
      sum += Mass(weights[i]);
    }
    EXPECT_EQ(blocks, expected);
    EXPECT_EQ(total, sum);
  }
}

TEST(FindFirstTest, LowestIndex) {
  std::mt19937 random(3);
  for (const int64_t size : kSizes) {
    std::vector<float> row(size, 0.0f);
    EXPECT_EQ(FindFirst(row, 5.0f), size);
    for (int64_t at = size - 1; at >= 0; at -= 1 + static_cast<int64_t>(random() % 7)) {
      row[at] = 5.0f;
      EXPECT_EQ(FindFirst(row, 5.0f), at);
    }
  }
}

TEST(AppendKeysTest, StopsAtCapacityAndResumes) {
  std::mt19937 random(4);
  for (const int64_t size : kSizes) {
    const std::vector<float> row = RandomRow(random, size, 2);
    std::vector<TokenKey> expected;
    for (int64_t i = 0; i < size; ++i) {
      if (row[i] > 0.5f) expected.push_back(MakeTokenKey(row[i], static_cast<int32_t>(i)));
    }
    std::vector<TokenKey> all;
    for (int64_t i = 0; i < size;) {
      std::vector<TokenKey> some;
      i = AppendKeys(row, i, 0.5f, 5, some);
      EXPECT_LE(some.size(), 5u);
      EXPECT_TRUE(some.size() == 5 || i == size);
      all.insert(all.end(), some.begin(), some.end());
    }
    EXPECT_EQ(all, expected);
  }
}

TEST(BinTest, BinsAreInRankOrderAndHoldAllMass) {
  std::mt19937 random(5);
  for (const int64_t size : kSizes) {
    const std::vector<float> row = RandomRow(random, size, 12);
    const float max = FindRange(row).max;
    std::vector<float> weights(size);
    std::vector<uint64_t> blocks(MassBlocks(size));
    const uint64_t total = WeighRow(row, max, weights.data(), blocks.data());
    std::array<uint64_t, kBins> mass;
    BinMasses(row, max, weights.data(), mass);
    uint64_t sum = 0;
    TokenKey last = 0;
    size_t tokens = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      std::vector<TokenKey> keys;
      AppendBin(row, max, bin, keys);
      uint64_t bin_mass = 0;
      for (const TokenKey key : keys) bin_mass += Mass(weights[KeyToken(key)]);
      EXPECT_EQ(bin_mass, mass[bin]);
      sum += bin_mass;
      tokens += keys.size();
      if (keys.empty()) continue;
      EXPECT_GE(*std::min_element(keys.begin(), keys.end()), last);
      last = *std::max_element(keys.begin(), keys.end());
    }
    EXPECT_EQ(sum, total);
    EXPECT_EQ(tokens, static_cast<size_t>(size));
  }
}

TEST(DivideAndDropTest, AgainstPlainLoops) {
  std::mt19937 random(6);
  for (const int64_t size : kSizes) {
    const std::vector<float> row = RandomRow(random, size, 3);
    std::vector<float> divided(size);
    DivideRow(row, 0.7f, divided.data());
    std::vector<float> dropped = row;
    DropBelow(dropped, 0.25f);
    for (int64_t i = 0; i < size; ++i) {
      EXPECT_EQ(divided[i], row[i] / 0.7f);
      EXPECT_EQ(dropped[i], row[i] < 0.25f ? -kInf : row[i]);
    }
  }
}

TEST(LogRatioTest, AgainstTheLibrary) {
  EXPECT_EQ(LogRatio(uint64_t{1} << 44, kMassUnits), 0.0);
  std::mt19937_64 random(7);
  for (int i = 0; i < 100000; ++i) {
    const uint64_t value = (uint64_t{1} << 44) + (random() >> (2 + random() % 60));
    const double exact = std::log1p((static_cast<double>(value) - kMassUnits) / kMassUnits);
    ASSERT_NEAR(LogRatio(value, kMassUnits), exact, exact * 4e-16) << value;
  }
}

TEST(RowOpsTest, SameBitsOnEveryInstructionSet) {
  std::mt19937 random(8);
  std::vector<std::vector<float>> rows;
  for (const int64_t size : kSizes) rows.push_back(RandomRow(random, size, 8));
  rows.push_back(RandomRow(random, 100352, 3));

  struct Result {
    std::vector<std::vector<uint32_t>> weights;
    std::vector<uint64_t> totals;
    bool operator==(const Result&) const = default;
  };
  std::vector<Result> results;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::GetChosenTarget().Update(target);
    Result result;
    for (const std::vector<float>& row : rows) {
      std::vector<float> weights(row.size());
      std::vector<uint64_t> blocks(MassBlocks(static_cast<int64_t>(row.size())));
      result.totals.push_back(WeighRow(row, FindRange(row).max, weights.data(), blocks.data()));
      std::vector<uint32_t> bits;
      for (const float w : weights) bits.push_back(std::bit_cast<uint32_t>(w));
      result.weights.push_back(bits);
    }
    results.push_back(result);
  }
  hwy::GetChosenTarget().DeInit();
  ASSERT_FALSE(results.empty());
  RecordProperty("targets", static_cast<int>(results.size()));
  for (const Result& result : results) EXPECT_TRUE(result == results.front());
}

}  // namespace
}  // namespace lockstep

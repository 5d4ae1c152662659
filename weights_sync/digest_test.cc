#include "weights_sync/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace lockstep {
namespace {

std::vector<std::byte> RandomBytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// Values of the definition in digest.h, worked out in Python's integers.
TEST(DigestTest, Golden) {
  std::vector<std::byte> counting(20);
  for (size_t i = 0; i < counting.size(); ++i) counting[i] = static_cast<std::byte>(i);
  EXPECT_EQ(Digest({}), 0x0u);
  EXPECT_EQ(Digest(std::span(counting).first(8)), 0xdb5822801d02f48bu);
  EXPECT_EQ(Digest(std::span(counting).first(3)), 0x5ec39c7761a1664au);
  EXPECT_EQ(Digest(counting), 0xe11fa8db4423f43cu);
}

TEST(DigestTest, PiecesMakeNoDifference) {
  const std::vector<std::byte> bytes = RandomBytes(1003, 1);
  std::mt19937_64 random(2);
  for (int round = 0; round < 200; ++round) {
    Digester digester;
    for (size_t at = 0; at < bytes.size();) {
      const size_t count = std::min<size_t>(random() % 40, bytes.size() - at);
      digester.Add(std::span(bytes).subspan(at, count));
      at += count;
    }
    ASSERT_EQ(digester.Finish(), Digest(bytes));
  }
}

// What can go wrong on the way: a flipped bit, exchanged rows, a shifted or cut tail.
TEST(DigestTest, SeesCorruption) {
  const std::vector<std::byte> bytes = RandomBytes(512, 3);
  std::set<uint64_t> seen = {Digest(bytes)};
  size_t changes = 1;
  const auto expect_new = [&](const std::vector<std::byte>& changed) {
    EXPECT_TRUE(seen.insert(Digest(changed)).second);
    ++changes;
  };
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::vector<std::byte> changed = bytes;
    changed[bit / 8] ^= static_cast<std::byte>(1u << bit % 8);
    expect_new(changed);
  }
  for (size_t row = 0; row + 64 < bytes.size(); row += 32) {
    std::vector<std::byte> changed = bytes;
    std::swap_ranges(changed.begin() + row, changed.begin() + row + 32, changed.begin() + row + 32);
    expect_new(changed);
  }
  for (size_t size = 0; size < bytes.size(); ++size) expect_new({bytes.begin(), bytes.begin() + size});
  EXPECT_EQ(seen.size(), changes);
  // Zeros at the end count, although padding is zeros.
  EXPECT_NE(Digest(std::vector<std::byte>(8)), Digest(std::vector<std::byte>(7)));
}

}  // namespace
}  // namespace lockstep

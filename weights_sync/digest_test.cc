#include "weights_sync/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

std::vector<std::byte> RandomBytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// tests/data/digest_golden.json: what Python's integers give by the definition; numpy and torch are held to it as well.
TEST(DigestTest, Golden) {
  std::ifstream in(LOCKSTEP_TEST_DATA "/digest_golden.json");
  const nlohmann::json cases = nlohmann::json::parse(in).at("cases");
  ASSERT_GE(cases.size(), 12u);
  for (const nlohmann::json& golden : cases) {
    std::vector<std::byte> bytes;
    if (golden.contains("hex")) {
      const std::string hex = golden["hex"];
      for (size_t i = 0; i < hex.size(); i += 2) {
        bytes.push_back(static_cast<std::byte>(std::stoul(hex.substr(i, 2), nullptr, 16)));
      }
    } else {
      for (uint64_t i = 0; i < golden["pattern_bytes"].get<uint64_t>(); ++i) {
        bytes.push_back(static_cast<std::byte>(131 * i + 7 + i / 256));
      }
    }
    EXPECT_EQ(Digest(bytes), std::stoull(golden["digest"].get<std::string>(), nullptr, 16)) << golden;
  }
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

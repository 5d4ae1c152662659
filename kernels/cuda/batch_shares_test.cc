#include "kernels/cuda/batch_shares.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <span>
#include <vector>

namespace lockstep::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kPageSize = 64;

// Decode rows over page tables; a row may begin with the pages of an earlier one.
struct Rows {
  // `shared`: pages.
  Rows& Add(int64_t position, int64_t shared = 0, size_t of = 0) {
    std::vector<int32_t> table;
    if (shared > 0) table.assign(tables[of].begin(), tables[of].begin() + shared);
    while (static_cast<int64_t>(table.size()) * kPageSize <= position) table.push_back(next_page++);
    tables.push_back(table);
    positions.push_back(position);
    return *this;
  }
  std::vector<DeviceShare> Find(int64_t room = 8) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tables.size(); ++i) {
      pieces.push_back({.row_begin = static_cast<int64_t>(i),
                        .row_count = 1,
                        .position = positions[i],
                        .page_table = tables[i].data()});
    }
    std::vector<DeviceShare> shares(room, {.count = 77});
    const int64_t found = FindShares(pieces, kPageSize, shares);
    for (int64_t i = found; i < room; ++i) EXPECT_EQ(shares[i].count, 0) << "padding";
    shares.resize(found);
    return shares;
  }

  std::vector<std::vector<int32_t>> tables;
  std::vector<int64_t> positions;
  int32_t next_page = 100;
};

std::vector<int32_t> PiecesOf(const DeviceShare& share) {
  return {share.pieces, share.pieces + share.count};
}

TEST(BatchShares, SamplesOfAPromptAreTakenTogether) {
  const auto shares = Rows().Add(700).Add(900).Add(650, 8, 0).Add(640, 8, 0).Add(910, 14, 1).Find();
  ASSERT_EQ(shares.size(), 2u);
  EXPECT_THAT(PiecesOf(shares[0]), ElementsAre(0, 2, 3));
  EXPECT_EQ(shares[0].positions, 512);
  EXPECT_THAT(PiecesOf(shares[1]), ElementsAre(1, 4));
  EXPECT_EQ(shares[1].positions, 896);
}

TEST(BatchShares, OnlyWholeTilesBeforeEveryRowCount) {
  // 9 pages are 576 positions, 4.5 tiles.
  auto shares = Rows().Add(700).Add(650, 9, 0).Find();
  ASSERT_EQ(shares.size(), 1u);
  EXPECT_EQ(shares[0].positions, 512);
  // A row at 400 sees 3 tiles of what it shares, one at 384 as many.
  shares = Rows().Add(400).Add(384, 6, 0).Find();
  ASSERT_EQ(shares.size(), 1u);
  EXPECT_EQ(shares[0].positions, 384);
}

TEST(BatchShares, ShortOnesAreLeftAlone) {
  EXPECT_THAT(Rows().Add(255).Add(255, 3, 0).Find(), IsEmpty());
  EXPECT_THAT(Rows().Add(700).Add(700, 3, 0).Find(), IsEmpty());
  EXPECT_THAT(Rows().Add(700).Add(700).Find(), IsEmpty());
  EXPECT_THAT(Rows().Find(), IsEmpty());
}

TEST(BatchShares, AShareHasAtMostEightPieces) {
  Rows rows;
  rows.Add(700);
  for (int i = 1; i < 18; ++i) rows.Add(700, 8, 0);
  const auto shares = rows.Find();
  ASSERT_EQ(shares.size(), 3u);
  EXPECT_EQ(shares[0].count, 8);
  EXPECT_EQ(shares[1].count, 8);
  EXPECT_EQ(shares[2].count, 2);
}

TEST(BatchShares, AShareIsNotCutShortForOneMore) {
  // Two rows share 32 pages; a third one shares 4 with them: 31 tiles are saved without it, 4 with it.
  const auto shares = Rows().Add(4000).Add(4000, 32, 0).Add(4000, 4, 0).Find();
  ASSERT_EQ(shares.size(), 1u);
  EXPECT_EQ(shares[0].count, 2);
  EXPECT_EQ(shares[0].positions, 2048);
}

TEST(BatchShares, NoMoreThanThereIsRoomFor) {
  Rows rows;
  for (size_t i = 0; i < 6; ++i) rows.Add(600).Add(600, 8, 2 * i);
  EXPECT_EQ(rows.Find(6).size(), 6u);
  EXPECT_EQ(rows.Find(4).size(), 4u);
  EXPECT_EQ(rows.Find(0).size(), 0u);
}

TEST(BatchShares, RandomTreesGiveNothingUnshared) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    Rows rows;
    rows.Add(2000);
    for (int i = 1; i < 40; ++i) {
      const size_t of = random() % rows.tables.size();
      rows.Add(random() % 2000, random() % (rows.tables[of].size() + 1), of);
    }
    std::set<int32_t> taken;
    for (const DeviceShare& share : rows.Find(10)) {
      ASSERT_GE(share.count, 2);
      ASSERT_LE(share.count, kSharePieces);
      ASSERT_GE(share.positions, 256);
      ASSERT_EQ(share.positions % 128, 0);
      for (const int32_t piece : PiecesOf(share)) {
        ASSERT_TRUE(taken.insert(piece).second) << "a piece in two shares";
        ASSERT_LE(share.positions, rows.positions[piece]);
        const auto& first = rows.tables[share.pieces[0]];
        const int64_t pages = share.positions / kPageSize;
        ASSERT_TRUE(std::equal(first.begin(), first.begin() + pages, rows.tables[piece].begin()));
      }
    }
  }
}

}  // namespace
}  // namespace lockstep::cuda

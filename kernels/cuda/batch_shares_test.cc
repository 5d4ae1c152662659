#include "kernels/cuda/batch_shares.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <set>
#include <span>
#include <utility>
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
  std::vector<DeviceShare> Find(int64_t room = 8) const {
    ShareFinder finder;
    return Find(finder, room);
  }
  std::vector<DeviceShare> Find(ShareFinder& finder, int64_t room = 8) const {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tables.size(); ++i) {
      pieces.push_back({.row_begin = static_cast<int64_t>(i),
                        .row_count = 1,
                        .position = positions[i],
                        .page_table = tables[i].data()});
    }
    std::vector<DeviceShare> shares(room, {.count = 77});
    const int64_t found = finder.Find(pieces, kPageSize, shares);
    for (int64_t i = found; i < room; ++i) EXPECT_EQ(shares[i].count, 0) << "padding";
    shares.resize(found);
    return shares;
  }

  // `row` at a later position, with pages of its own for it; or at an earlier one.
  void Move(size_t row, int64_t position) {
    positions[row] = position;
    tables[row].resize(std::min<size_t>(tables[row].size(), position / kPageSize + 1));
    while (static_cast<int64_t>(tables[row].size()) * kPageSize <= position) tables[row].push_back(next_page++);
  }
  // All rows one position on.
  void Step() {
    for (size_t row = 0; row < positions.size(); ++row) Move(row, positions[row] + 1);
  }
  void Remove(size_t row) {
    tables.erase(tables.begin() + static_cast<std::ptrdiff_t>(row));
    positions.erase(positions.begin() + static_cast<std::ptrdiff_t>(row));
  }
  void Swap(size_t a, size_t b) {
    std::swap(tables[a], tables[b]);
    std::swap(positions[a], positions[b]);
  }

  std::vector<std::vector<int32_t>> tables;
  std::vector<int64_t> positions;
  int32_t next_page = 100;
};

// Two prompts of 8 and 14 pages, three samples each, every one with a page of its own after them.
Rows TwoPrompts() {
  return Rows().Add(700).Add(980).Add(650, 8, 0).Add(640, 8, 0).Add(970, 14, 1).Add(1000, 14, 1);
}

MATCHER_P(SameShare, wanted, "") {
  return std::ranges::equal(arg.pieces, wanted.pieces) && arg.count == wanted.count &&
         arg.positions == wanted.positions;
}

// What `finder` finds, which remembers an earlier batch, is what one that remembers nothing finds.
void ExpectSameAsAnew(const Rows& rows, ShareFinder& finder, int64_t room = 8) {
  const std::vector<DeviceShare> found = rows.Find(finder, room), anew = rows.Find(room);
  ASSERT_EQ(found.size(), anew.size());
  for (size_t i = 0; i < anew.size(); ++i) EXPECT_THAT(found[i], SameShare(anew[i]));
}

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

TEST(ShareFinder, ABatchOfTheSameSequencesIsSearchedOnce) {
  Rows rows = TwoPrompts();
  ShareFinder finder;
  for (int step = 0; step < 300; ++step) {
    ExpectSameAsAnew(rows, finder);
    rows.Step();
  }
  EXPECT_EQ(rows.Find(finder).size(), 2u);
  EXPECT_EQ(finder.searches(), 1);
}

TEST(ShareFinder, AnotherBatchIsSearchedAgain) {
  const auto expect_search = [](const char* what, const auto& change) {
    SCOPED_TRACE(what);
    Rows rows = TwoPrompts();
    ShareFinder finder;
    rows.Find(finder);
    change(rows);
    ExpectSameAsAnew(rows, finder);
    EXPECT_EQ(finder.searches(), 2);
  };
  expect_search("one sequence more", [](Rows& rows) { rows.Add(700, 8, 0); });
  expect_search("one less", [](Rows& rows) { rows.Remove(3); });
  expect_search("another in its place", [](Rows& rows) {
    rows.Add(640, 14, 1);
    rows.Swap(3, 6);
    rows.Remove(6);
  });
  expect_search("another order", [](Rows& rows) { rows.Swap(2, 4); });
  expect_search("copy-on-write of a shared page", [](Rows& rows) { rows.tables[2][7] = rows.next_page++; });
  expect_search("a sequence preempted and recomputed", [](Rows& rows) {
    const int64_t position = rows.positions[4];
    rows.Move(4, 0);
    rows.tables[4][0] = rows.next_page++;
    rows.Move(4, position);
  });
  expect_search("one back before the end of what it shared", [](Rows& rows) { rows.Move(2, 511); });
  expect_search("a fork of a response", [](Rows& rows) {
    rows.Add(700, 10, 0);
    rows.Swap(3, 6);
    rows.Remove(6);
  });
  expect_search("one grown as long as shares are", [](Rows& rows) {
    ShareFinder finder;
    rows.Add(250, 3, 0);
    rows.Find(finder);
    rows.Step();
    ExpectSameAsAnew(rows, finder);
    EXPECT_EQ(finder.searches(), 1) << "still too short";
    rows.Move(6, 256);
    ExpectSameAsAnew(rows, finder);
    EXPECT_EQ(finder.searches(), 2);
  });
}

TEST(ShareFinder, RoomAndPageSizeAreOfTheBatchToo) {
  Rows rows;
  for (size_t i = 0; i < 6; ++i) rows.Add(1200).Add(1200, 8, 2 * i);
  std::vector<Piece> pieces;
  for (const std::vector<int32_t>& table : rows.tables)
    pieces.push_back({.position = 1200, .page_table = table.data()});
  ShareFinder finder;
  std::vector<DeviceShare> shares(6);
  ASSERT_EQ(finder.Find(pieces, 2 * kPageSize, shares), 6);
  EXPECT_EQ(shares[0].positions, 1024);
  for (const int64_t room : {6, 4, 6, 0, 6}) ExpectSameAsAnew(rows, finder, room);
}

// A row with nothing of its own yet is the front of another's table; its next page puts it before or after that one.
TEST(ShareFinder, ARowThatGetsItsFirstPageOfItsOwnIsSearchedAgain) {
  Rows rows = Rows().Add(640).Add(640, 10, 0).Add(640, 10, 0);
  ShareFinder finder;
  ExpectSameAsAnew(rows, finder);
  for (int step = 0; step < 300; ++step) {
    rows.Step();
    ExpectSameAsAnew(rows, finder);
  }
  EXPECT_EQ(finder.searches(), 2);
}

TEST(ShareFinder, RandomChangesAreAllSeen) {
  std::mt19937 random(1);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  int64_t searches = 0;
  for (int round = 0; round < 100; ++round) {
    Rows rows;
    rows.Add(2000);
    ShareFinder finder;
    for (int step = 0; step < 100; ++step) {
      const size_t row = below(rows.tables.size());
      switch (below(16)) {
        case 0:
          rows.Add(static_cast<int64_t>(below(2000)), static_cast<int64_t>(below(rows.tables[row].size() + 1)), row);
          break;
        case 1:
          if (rows.tables.size() > 1) rows.Remove(row);
          break;
        case 2:
          rows.Swap(row, below(rows.tables.size()));
          break;
        case 3:
          rows.tables[row][below(rows.tables[row].size())] = rows.next_page++;
          break;
        case 4:
          rows.Move(row, rows.positions[row] + static_cast<int64_t>(below(200)));
          break;
        case 5:
          rows.Move(row, rows.positions[row] - static_cast<int64_t>(below(rows.positions[row] + 1)));
          break;
        default:
          rows.Step();
      }
      ExpectSameAsAnew(rows, finder, 4);
    }
    searches += finder.searches();
  }
  EXPECT_LT(searches, 100 * 100 / 2);
}

}  // namespace
}  // namespace lockstep::cuda

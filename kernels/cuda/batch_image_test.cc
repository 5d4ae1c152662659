// A batch's image, read back through the pointers that kernels get. Host memory stands in for the device's.
#include "kernels/cuda/batch_image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace lockstep::cuda {
namespace {

using ::testing::ElementsAre;

struct Batch {
  // Two decode rows at positions 70 and 0, then prefill pieces of 130 rows from position 60 and of 1 row from 5.
  Batch() {
    Add(70, 1, 3);
    Add(0, 1, 4);
    Add(60, 130, 5);
    Add(5, 1, 6);
    logit_rows = {0, 1, 131, 132};
  }
  void Add(int64_t position, int64_t count, int32_t slot) {
    const int64_t pages = (position + count + kPageSize - 1) / kPageSize;
    tables.emplace_back();
    for (int64_t i = 0; i < pages; ++i) tables.back().push_back(slot * 100 + static_cast<int32_t>(i));
    pieces.push_back({.row_begin = static_cast<int64_t>(tokens.size()),
                      .row_count = count,
                      .position = position,
                      .page_table = tables.back().data(),
                      .slot = slot});
    for (int64_t i = 0; i < count; ++i) {
      tokens.push_back(slot * 1000 + static_cast<int32_t>(i));
      positions.push_back(position + i);
    }
  }
  StepBatch view() const { return {tokens, positions, pieces, logit_rows, kPageSize}; }

  static constexpr int64_t kPageSize = 64;
  std::vector<int32_t> tokens;
  std::vector<int64_t> positions;
  std::vector<Piece> pieces;
  std::vector<std::vector<int32_t>> tables;
  std::vector<int64_t> logit_rows;
};

TEST(BatchImage, HoldsWhatTheBatchSays) {
  const Batch batch;
  const BatchSizes sizes = SizesOf(batch.view(), Batch::kPageSize);
  EXPECT_EQ(sizes.rows, 133);
  EXPECT_EQ(sizes.pieces, 4);
  EXPECT_EQ(sizes.decode_pieces, 2);
  EXPECT_EQ(sizes.tiles, 3 + 1);  // positions 60..63, 64..127, 128..189; and 5
  EXPECT_EQ(sizes.pages, 2 + 1 + 3 + 1);
  std::vector<std::byte> image(sizes.bytes(), std::byte{0xEE});
  ShareFinder finder;
  WriteBatchImage(batch.view(), sizes, Batch::kPageSize, finder, image.data());
  const DeviceBatch device = BatchAt(image.data(), sizes);
  EXPECT_EQ(device.rows, 133);
  EXPECT_EQ(device.piece_count, 4);
  EXPECT_EQ(device.decode_pieces, 2);
  EXPECT_EQ(device.tile_count, sizes.tiles);
  for (int64_t r = 0; r < 133; ++r) {
    EXPECT_EQ(device.tokens[r], batch.tokens[r]);
    EXPECT_EQ(device.positions[r], batch.positions[r]);
    const Piece& piece = batch.pieces[device.row_piece[r]];
    EXPECT_TRUE(r >= piece.row_begin && r < piece.row_begin + piece.row_count) << r;
  }
  for (int i = 0; i < 4; ++i) {
    const DevicePiece& piece = device.pieces[i];
    EXPECT_EQ(piece.row_begin, batch.pieces[i].row_begin);
    EXPECT_EQ(piece.row_count, batch.pieces[i].row_count);
    EXPECT_EQ(piece.position, batch.pieces[i].position);
    EXPECT_EQ(piece.slot, batch.pieces[i].slot);
    for (size_t p = 0; p < batch.tables[i].size(); ++p) {
      EXPECT_EQ(device.pages[piece.page_begin + p], batch.tables[i][p]);
    }
  }
  const int32_t* logit_rows = LogitRowsAt(image.data(), sizes);
  EXPECT_THAT(std::vector<int32_t>(logit_rows, logit_rows + 4), ElementsAre(0, 1, 131, 132));
}

TEST(BatchImage, TilesCoverPrefillPiecesAndCrossNoBoundary) {
  const Batch batch;
  const BatchSizes sizes = SizesOf(batch.view(), Batch::kPageSize);
  std::vector<std::byte> image(sizes.bytes());
  ShareFinder finder;
  WriteBatchImage(batch.view(), sizes, Batch::kPageSize, finder, image.data());
  const DeviceBatch device = BatchAt(image.data(), sizes);
  int32_t row = 2;  // after the decode rows
  for (int i = 0; i < device.tile_count; ++i) {
    const DeviceTile& tile = device.tiles[i];
    const DevicePiece& piece = device.pieces[tile.piece];
    EXPECT_EQ(tile.row_begin, row);
    EXPECT_EQ(tile.position, piece.position + tile.row_begin - piece.row_begin);
    EXPECT_EQ(tile.position / 64, (tile.position + tile.row_count - 1) / 64);
    row += tile.row_count;
  }
  EXPECT_EQ(row, 133);
}

TEST(BatchImage, ARecordedStepIsPaddedWithNothing) {
  Batch batch;
  batch.pieces.resize(2);
  batch.tokens.resize(2);
  batch.positions.resize(2);
  EXPECT_FALSE(IsDecodeStep(batch.view()));
  batch.logit_rows.resize(2);
  ASSERT_TRUE(IsDecodeStep(batch.view()));
  const BatchSizes sizes = RecordedSizes(4, SizesOf(batch.view(), Batch::kPageSize).pages);
  std::vector<std::byte> image(sizes.bytes(), std::byte{0xEE});
  ShareFinder finder;
  WriteBatchImage(batch.view(), sizes, Batch::kPageSize, finder, image.data());
  const DeviceBatch device = BatchAt(image.data(), sizes);
  EXPECT_EQ(device.rows, 4);
  EXPECT_EQ(device.decode_pieces, 4);
  for (int i = 2; i < 4; ++i) {
    EXPECT_EQ(device.pieces[i].row_count, 0);
    EXPECT_EQ(device.row_piece[i], -1);
    EXPECT_EQ(device.tokens[i], 0);
    EXPECT_EQ(LogitRowsAt(image.data(), sizes)[i], 0);
  }
  // Any number of pages leaves the arrays where they were.
  EXPECT_EQ(RecordedSizes(4, 1).pages_at(), RecordedSizes(4, 100000).pages_at());
}

TEST(BatchImage, PiecesKnowWhatTheyShare) {
  Batch batch;
  batch.pieces.clear();
  batch.tokens.clear();
  batch.positions.clear();
  batch.Add(640, 1, 7);
  batch.Add(20, 1, 8);
  batch.Add(600, 1, 9);
  batch.tables.back() = batch.tables[batch.tables.size() - 3];
  batch.pieces.back().page_table = batch.tables.back().data();
  batch.logit_rows = {0, 1, 2};
  BatchSizes sizes = RecordedSizes(4, SizesOf(batch.view(), Batch::kPageSize).pages);
  const int64_t bytes = sizes.bytes();
  sizes.shares = 2;
  EXPECT_GT(sizes.bytes(), bytes);
  std::vector<std::byte> image(sizes.bytes(), std::byte{0xEE});
  ShareFinder finder;
  EXPECT_EQ(WriteBatchImage(batch.view(), sizes, Batch::kPageSize, finder, image.data()), 1);
  const DeviceBatch device = BatchAt(image.data(), sizes);
  EXPECT_EQ(device.share_count, 2);
  EXPECT_EQ(device.shares[0].count, 2);
  EXPECT_EQ(device.shares[0].positions, 512);
  EXPECT_THAT(std::vector<int32_t>(device.shares[0].pieces, device.shares[0].pieces + 2), ElementsAre(0, 2));
  EXPECT_EQ(device.shares[1].count, 0);
  EXPECT_EQ(device.pieces[0].shared, 512);
  EXPECT_EQ(device.pieces[1].shared, 0);
  EXPECT_EQ(device.pieces[2].shared, 512);
  EXPECT_EQ(device.pieces[3].shared, 0);
  const std::vector<AttentionShare> shares = SharesOf(image.data(), sizes);
  ASSERT_EQ(shares.size(), 1u);
  EXPECT_EQ(shares[0].positions, 512);
  EXPECT_THAT(shares[0].row_positions, ElementsAre(640, 600));
  // Without room none are looked for.
  sizes.shares = 0;
  EXPECT_EQ(WriteBatchImage(batch.view(), sizes, Batch::kPageSize, finder, image.data()), 0);
  EXPECT_EQ(BatchAt(image.data(), sizes).pieces[0].shared, 0);
}

TEST(BatchImage, RecordedSizesAreALadder) {
  for (int64_t rows = 1; rows <= kMaxRecordedRows; ++rows) {
    const int64_t padded = RecordedRows(rows);
    EXPECT_GE(padded, rows);
    EXPECT_LT(padded, std::max<int64_t>(rows + 4, rows * 3 / 2)) << rows;
    EXPECT_EQ(RecordedRows(padded), padded);
  }
  EXPECT_EQ(RecordedRows(kMaxRecordedRows + 1), 0);
}

}  // namespace
}  // namespace lockstep::cuda

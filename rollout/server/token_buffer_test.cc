#include "rollout/server/token_buffer.h"

#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "lockstep/v1/rollout.pb.h"
#include "rollout/server/limits.h"
#include "rollout/server/respond.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

constexpr int64_t kVocab = 100'000;

LogprobLayout Everything() {
  return {.raw = true, .temperature = true, .processed = true, .top_k = 2, .kept = true, .vocab_size = kVocab};
}

RowLogprobs Row(int32_t i) {
  RowLogprobs row;
  row.raw = -static_cast<float>(i);
  row.temperature = row.raw - 0.25f;
  row.processed = row.raw - 0.5f;
  row.top_raw = {{i, -1}, {i + 1, -2}};
  row.top_temperature = {{i, -3}, {i + 1, -4}};
  row.top_processed = {{i, 0}};  // the filter kept one
  row.kept_token_ids.resize(i % 3 + 1);
  std::iota(row.kept_token_ids.begin(), row.kept_token_ids.end(), i);
  return row;
}

TokenBuffer Filled(int64_t offset, int32_t n) {
  TokenBuffer buffer(offset, Everything());
  for (int32_t i = 0; i < n; ++i) buffer.Append(std::vector<int32_t>{i}, std::vector<RowLogprobs>{Row(i)});
  return buffer;
}

TEST(TokenBuffer, CopiesAnyRangeWhole) {
  const TokenBuffer buffer = Filled(10, 700);
  EXPECT_EQ(buffer.end(), 710);
  for (const int64_t offset : {10, 11, 265, 266, 267, 521, 522, 709}) {
    const TokenSlice slice = buffer.Copy(offset, 1 << 20);
    ASSERT_EQ(slice.offset, offset);
    ASSERT_EQ(slice.end(), 710);
    ASSERT_EQ(slice.tokens.size(), static_cast<size_t>(slice.rows));
    int64_t kept = 0;
    for (int64_t r = 0; r < slice.rows; ++r) {
      const int32_t i = static_cast<int32_t>(offset - 10 + r);
      EXPECT_EQ(slice.tokens[r], i);
      EXPECT_EQ(slice.logprobs.raw[r], Row(i).raw);
      EXPECT_EQ(slice.logprobs.top_raw_ids[2 * r + 1], i + 1);
      EXPECT_EQ(slice.logprobs.top_processed_ids[2 * r + 1], -1);
      EXPECT_EQ(slice.logprobs.kept_counts[r], i % 3 + 1);
      EXPECT_EQ(slice.logprobs.kept_ids[kept], i);
      kept += i % 3 + 1;
    }
    EXPECT_EQ(slice.logprobs.kept_ids.size(), static_cast<size_t>(kept));
  }
  EXPECT_EQ(buffer.Copy(710, 1 << 20).rows, 0);
}

TEST(TokenBuffer, ASliceMayEndInsideAChunk) {
  const TokenBuffer buffer = Filled(0, 600);
  for (int64_t offset = 0; offset < 600;) {
    const TokenSlice slice = buffer.Copy(offset, 5000);
    ASSERT_GT(slice.rows, 0);
    ASSERT_LT(slice.rows, 100);
    EXPECT_EQ(slice.tokens.front(), offset);
    EXPECT_EQ(slice.tokens.back(), slice.end() - 1);
    EXPECT_EQ(slice.logprobs.kept_ids.size(), static_cast<size_t>(slice.logprobs.KeptIn(0, slice.rows)));
    offset = slice.end();
  }
  EXPECT_EQ(buffer.Copy(5, 1).rows, 1) << "at least one row, however small the limit";
}

TEST(TokenBuffer, KeptEverythingIsCountZero) {
  LogprobLayout layout{
      .raw = false, .temperature = false, .processed = false, .top_k = 0, .kept = true, .vocab_size = 3};
  TokenBuffer buffer(0, layout);
  RowLogprobs all, some;
  all.kept_token_ids = {0, 1, 2};
  some.kept_token_ids = {1, 2};
  buffer.Append(std::vector<int32_t>{1, 2}, std::vector<RowLogprobs>{all, some});
  const TokenSlice slice = buffer.Copy(0, 1 << 20);
  EXPECT_THAT(slice.logprobs.kept_counts, ElementsAre(0, 2));
  EXPECT_THAT(slice.logprobs.kept_ids, ElementsAre(1, 2));
}

TEST(TokenBuffer, BytesAreAdditiveAndTrimmedByChunks) {
  TokenBuffer buffer = Filled(0, 600);
  const int64_t all = buffer.Bytes(0, 600);
  for (const int64_t cut : {0, 1, 255, 256, 300, 600}) EXPECT_EQ(buffer.Bytes(0, cut) + buffer.Bytes(cut, 600), all);
  // Token, three kinds with two entries of id and logprob each, count; rows keep 1, 2 or 3 ids in turn.
  EXPECT_EQ(all, 600 * (4 + 3 * (4 + 2 * 8) + 4 + 2 * 4));
  buffer.TrimBefore(300);
  EXPECT_EQ(buffer.begin(), 256);
  EXPECT_EQ(buffer.Copy(256, 1 << 20).tokens.front(), 256);
  buffer.TrimBefore(600);
  EXPECT_EQ(buffer.begin(), 600);
  buffer.Append(std::vector<int32_t>{7}, std::vector<RowLogprobs>{Row(7)});
  EXPECT_EQ(buffer.Copy(600, 1 << 20).tokens.front(), 7);
}

// The bound that splits messages, against protobuf's own count, at the largest ids and the widest lists.
TEST(MaxWireBytes, BoundsWhatProtobufEncodes) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    LogprobLayout layout = Everything();
    layout.top_k = static_cast<int32_t>(random() % 65);
    layout.processed = random() % 2;
    layout.kept = random() % 2;
    TokenBuffer buffer(1'000'000'000, layout);
    int64_t bound = 0;
    const int rows = 1 + static_cast<int>(random() % 300);
    for (int r = 0; r < rows; ++r) {
      RowLogprobs row = Row(static_cast<int32_t>(kVocab - 5));
      row.kept_token_ids.assign(random() % 50, kVocab - 1);
      bound += MaxWireBytes(layout, layout.kept ? row.kept_token_ids.size() : 0);
      buffer.Append(std::vector<int32_t>{static_cast<int32_t>(kVocab - 1)}, std::vector<RowLogprobs>{row});
    }
    RequestInfo info;
    info.layout = layout;
    ResultPiece piece;
    piece.slice = buffer.Copy(buffer.begin(), INT64_MAX);
    ASSERT_EQ(piece.slice.rows, rows);
    v1::GenerateResponse response;
    FillResponse(info, piece, &response);
    EXPECT_LE(static_cast<int64_t>(response.ByteSizeLong()), bound + 200) << "200: headers of at most 20 fields";
  }
}

}  // namespace
}  // namespace lockstep

#include "kernels/cuda/batch_image.h"

#include <algorithm>
#include <cstring>

#include "rollout/base/check.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kAlign = 16;
constexpr int64_t kTile = 64;  // positions

int64_t After(int64_t at, int64_t count, int64_t element) {
  return (at + count * element + kAlign - 1) / kAlign * kAlign;
}

int64_t PagesOf(const Piece& piece, int64_t page_size) {
  return page_size == 0 ? 0 : (piece.position + piece.row_count + page_size - 1) / page_size;
}

// Pieces of one row at the front: those that decode kernels take.
int64_t LeadingDecodePieces(std::span<const Piece> pieces) {
  int64_t count = 0;
  while (count < static_cast<int64_t>(pieces.size()) && pieces[count].row_count == 1) ++count;
  return count;
}

template <class T>
T* ArrayAt(std::byte* base, int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

}  // namespace

int64_t BatchSizes::tiles_at() const {
  return After(pieces_at(), pieces, sizeof(DevicePiece));
}
int64_t BatchSizes::tokens_at() const {
  return After(tiles_at(), tiles, sizeof(DeviceTile));
}
int64_t BatchSizes::positions_at() const {
  return After(tokens_at(), rows, sizeof(int32_t));
}
int64_t BatchSizes::row_piece_at() const {
  return After(positions_at(), rows, sizeof(int32_t));
}
int64_t BatchSizes::logit_rows_at() const {
  return After(row_piece_at(), rows, sizeof(int32_t));
}
int64_t BatchSizes::shares_at() const {
  return After(logit_rows_at(), logit_rows, sizeof(int32_t));
}
int64_t BatchSizes::pages_at() const {
  return After(shares_at(), shares, sizeof(DeviceShare));
}
int64_t BatchSizes::bytes() const {
  return After(pages_at(), pages, sizeof(int32_t));
}

BatchSizes SizesOf(const StepBatch& batch, int64_t page_size) {
  BatchSizes sizes{.rows = static_cast<int64_t>(batch.tokens.size()),
                   .logit_rows = static_cast<int64_t>(batch.logit_rows.size()),
                   .pieces = static_cast<int64_t>(batch.pieces.size()),
                   .decode_pieces = LeadingDecodePieces(batch.pieces)};
  for (const Piece& piece : batch.pieces) sizes.pages += PagesOf(piece, page_size);
  for (const Piece& piece : batch.pieces.subspan(sizes.decode_pieces)) {
    sizes.tiles += (piece.position + piece.row_count - 1) / kTile - piece.position / kTile + 1;
  }
  return sizes;
}

bool IsDecodeStep(const StepBatch& batch) {
  return LeadingDecodePieces(batch.pieces) == static_cast<int64_t>(batch.pieces.size()) &&
         batch.logit_rows.size() == batch.tokens.size();
}

int64_t RecordedRows(int64_t rows) {
  if (rows > kMaxRecordedRows) return 0;
  // Decode reads the same weights for any of these, so what padding costs is small beside a recording for each size.
  for (const int64_t size : {1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224}) {
    if (rows <= size) return size;
  }
  return kMaxRecordedRows;
}

BatchSizes RecordedSizes(int64_t rows, int64_t pages) {
  return {.rows = rows, .logit_rows = rows, .pieces = rows, .decode_pieces = rows, .tiles = 0, .pages = pages};
}

int64_t WriteBatchImage(const StepBatch& batch, const BatchSizes& sizes, int64_t page_size, ShareFinder& finder,
                        std::byte* image) {
  auto* pieces = ArrayAt<DevicePiece>(image, sizes.pieces_at());
  auto* tiles = ArrayAt<DeviceTile>(image, sizes.tiles_at());
  auto* tokens = ArrayAt<int32_t>(image, sizes.tokens_at());
  auto* positions = ArrayAt<int32_t>(image, sizes.positions_at());
  auto* row_piece = ArrayAt<int32_t>(image, sizes.row_piece_at());
  auto* logit_rows = ArrayAt<int32_t>(image, sizes.logit_rows_at());
  auto* pages = ArrayAt<int32_t>(image, sizes.pages_at());

  const int64_t rows = static_cast<int64_t>(batch.tokens.size());
  std::copy(batch.tokens.begin(), batch.tokens.end(), tokens);
  for (int64_t r = 0; r < rows; ++r) positions[r] = static_cast<int32_t>(batch.positions[r]);
  std::fill(tokens + rows, tokens + sizes.rows, 0);
  std::fill(positions + rows, positions + sizes.rows, 0);
  std::fill(row_piece + rows, row_piece + sizes.rows, -1);
  for (size_t i = 0; i < batch.logit_rows.size(); ++i) logit_rows[i] = static_cast<int32_t>(batch.logit_rows[i]);
  std::fill(logit_rows + batch.logit_rows.size(), logit_rows + sizes.logit_rows, 0);

  int64_t page = 0, tile = 0;
  for (size_t i = 0; i < batch.pieces.size(); ++i) {
    const Piece& piece = batch.pieces[i];
    pieces[i] = {.row_begin = static_cast<int32_t>(piece.row_begin),
                 .row_count = static_cast<int32_t>(piece.row_count),
                 .position = static_cast<int32_t>(piece.position),
                 .slot = piece.slot,
                 .page_begin = static_cast<int32_t>(page)};
    const int64_t count = PagesOf(piece, page_size);
    std::copy_n(piece.page_table, count, pages + page);
    page += count;
    std::fill_n(row_piece + piece.row_begin, piece.row_count, static_cast<int32_t>(i));
    if (static_cast<int64_t>(i) < sizes.decode_pieces) continue;
    for (int64_t done = 0; done < piece.row_count;) {
      const int64_t position = piece.position + done;
      const int64_t count_here = std::min(piece.row_count - done, kTile - position % kTile);
      tiles[tile++] = {.piece = static_cast<int32_t>(i),
                       .row_begin = static_cast<int32_t>(piece.row_begin + done),
                       .row_count = static_cast<int32_t>(count_here),
                       .position = static_cast<int32_t>(position)};
      done += count_here;
    }
  }
  LOCKSTEP_CHECK(page <= sizes.pages && tile == sizes.tiles, "{} of {} pages, {} of {} tiles", page, sizes.pages, tile,
                 sizes.tiles);
  std::fill(pieces + batch.pieces.size(), pieces + sizes.pieces, DevicePiece{});

  const std::span shares(ArrayAt<DeviceShare>(image, sizes.shares_at()), sizes.shares);
  const int64_t decodes = std::min<int64_t>(sizes.decode_pieces, static_cast<int64_t>(batch.pieces.size()));
  const int64_t found = finder.Find(batch.pieces.first(decodes), page_size, shares);
  for (const DeviceShare& share : shares.first(found)) {
    for (int32_t i = 0; i < share.count; ++i) pieces[share.pieces[i]].shared = share.positions;
  }
  return found;
}

std::vector<AttentionShare> SharesOf(const std::byte* image, const BatchSizes& sizes) {
  const DeviceBatch batch = BatchAt(image, sizes);
  std::vector<AttentionShare> shares;
  for (const DeviceShare& share : std::span(batch.shares, batch.share_count)) {
    if (share.count == 0) continue;
    AttentionShare& rows = shares.emplace_back(AttentionShare{.positions = share.positions});
    for (int32_t i = 0; i < share.count; ++i) rows.row_positions.push_back(batch.pieces[share.pieces[i]].position);
  }
  return shares;
}

DeviceBatch BatchAt(const std::byte* base, const BatchSizes& sizes) {
  return {.pieces = reinterpret_cast<const DevicePiece*>(base + sizes.pieces_at()),
          .tiles = reinterpret_cast<const DeviceTile*>(base + sizes.tiles_at()),
          .shares = reinterpret_cast<const DeviceShare*>(base + sizes.shares_at()),
          .pages = reinterpret_cast<const int32_t*>(base + sizes.pages_at()),
          .tokens = reinterpret_cast<const int32_t*>(base + sizes.tokens_at()),
          .positions = reinterpret_cast<const int32_t*>(base + sizes.positions_at()),
          .row_piece = reinterpret_cast<const int32_t*>(base + sizes.row_piece_at()),
          .rows = static_cast<int32_t>(sizes.rows),
          .piece_count = static_cast<int32_t>(sizes.pieces),
          .decode_pieces = static_cast<int32_t>(sizes.decode_pieces),
          .tile_count = static_cast<int32_t>(sizes.tiles),
          .share_count = static_cast<int32_t>(sizes.shares)};
}

const int32_t* LogitRowsAt(const std::byte* base, const BatchSizes& sizes) {
  return reinterpret_cast<const int32_t*>(base + sizes.logit_rows_at());
}

}  // namespace lockstep::cuda

#include "kernels/cuda/batch_shares.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace lockstep::cuda {
namespace {

// Attention's tile: what lies in one is taken whole or not at all.
constexpr int64_t kTile = 128;
// Below it, what a share saves does not pay for its own pass.
constexpr int64_t kMinPositions = 2 * kTile;

// Pages that lie before the piece's position: those it only reads. None if it is too short to share anything.
std::span<const int32_t> ReadPages(const Piece& piece, int64_t page_size) {
  if (piece.position < kMinPositions) return {};
  return {piece.page_table, static_cast<size_t>(piece.position / page_size)};
}

// Pages that both tables begin with.
int64_t CommonPages(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

}  // namespace

int64_t ShareFinder::Find(std::span<const Piece> pieces, int64_t page_size, std::span<DeviceShare> shares) {
  std::fill(shares.begin(), shares.end(), DeviceShare{});
  if (page_size == 0 || shares.empty()) return 0;
  if (!Remembers(pieces, page_size, shares.size())) Search(pieces, page_size, shares.size());
  std::copy(found_.begin(), found_.end(), shares.begin());
  return static_cast<int64_t>(found_.size());
}

bool ShareFinder::Remembers(std::span<const Piece> pieces, int64_t page_size, size_t room) const {
  if (page_size != page_size_ || room != room_ || pieces.size() != seen_.size()) return false;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const std::span<const int32_t> table = ReadPages(pieces[i], page_size);
    const int64_t pages = static_cast<int64_t>(table.size());
    const Seen& seen = seen_[i];
    if (seen.whole_table || seen.count == 0 ? pages != seen.count : pages < seen.count) return false;
    if (seen.count > 0 && std::memcmp(table.data(), &pages_[seen.begin], seen.count * sizeof(int32_t)) != 0) {
      return false;
    }
  }
  return true;
}

void ShareFinder::Search(std::span<const Piece> pieces, int64_t page_size, size_t room) {
  ++searches_;
  page_size_ = page_size;
  room_ = room;
  seen_.assign(pieces.size(), {});
  pages_.clear();
  found_.clear();
  const auto table = [&](int32_t piece) { return ReadPages(pieces[piece], page_size); };
  // By their tables: those with most in common are neighbours.
  std::vector<std::pair<int32_t, int32_t>> order;  // first page, piece
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto piece = static_cast<int32_t>(i);
    if (!table(piece).empty()) order.emplace_back(table(piece)[0], piece);
  }
  std::sort(order.begin(), order.end());
  for (auto begin = order.begin(); begin != order.end();) {
    const auto end = std::find_if(begin, order.end(), [&](const auto& o) { return o.first != begin->first; });
    if (end - begin > 2) {
      std::sort(begin, end, [&](const auto& a, const auto& b) {
        return std::ranges::lexicographical_compare(table(a.second), table(b.second));
      });
    }
    begin = end;
  }

  // common[i]: pages that the pieces i - 1 and i of the order have in common.
  std::vector<int64_t> common(order.size() + 1);
  for (size_t i = 1; i < order.size(); ++i) common[i] = CommonPages(table(order[i - 1].second), table(order[i].second));
  for (size_t i = 0; i < order.size(); ++i) {
    const std::span<const int32_t> read = table(order[i].second);
    const int64_t pages = static_cast<int64_t>(read.size()), shared = std::max(common[i], common[i + 1]);
    Seen& seen = seen_[order[i].second];
    seen = {.begin = static_cast<int64_t>(pages_.size()),
            .count = std::min(shared + 1, pages),
            .whole_table = shared == pages};
    pages_.insert(pages_.end(), read.begin(), read.begin() + seen.count);
  }

  for (size_t i = 0; i < order.size() && found_.size() < room;) {
    DeviceShare share;
    share.pieces[share.count++] = order[i].second;
    // A further piece is taken in if more is read once then than before.
    int64_t positions = 0;
    while (share.count < kSharePieces && i + share.count < order.size()) {
      const size_t next = i + share.count;
      int64_t tiled = common[next] * page_size / kTile * kTile;
      if (share.count > 1) tiled = std::min(tiled, positions);
      if (tiled < kMinPositions || tiled * share.count <= positions * (share.count - 1)) break;
      positions = tiled;
      share.pieces[share.count++] = order[next].second;
    }
    i += share.count;
    if (share.count < 2) continue;
    share.positions = static_cast<int32_t>(positions);
    found_.push_back(share);
  }
}

}  // namespace lockstep::cuda

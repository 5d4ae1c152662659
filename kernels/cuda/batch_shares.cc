#include "kernels/cuda/batch_shares.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace lockstep::cuda {
namespace {

// Attention's tile: what lies in one is taken whole or not at all.
constexpr int64_t kTile = 128;
// Below it, what a share saves does not pay for its own pass.
constexpr int64_t kMinPositions = 2 * kTile;

// Positions in pages that both have, before the positions of both.
int64_t SharedPositions(const Piece& a, const Piece& b, int64_t page_size) {
  const int64_t limit = std::min(a.position, b.position);
  const int32_t* end = a.page_table + limit / page_size;
  const int64_t pages = std::mismatch(a.page_table, end, b.page_table).first - a.page_table;
  return pages * page_size / kTile * kTile;
}

}  // namespace

int64_t FindShares(std::span<const Piece> pieces, int64_t page_size, std::span<DeviceShare> shares) {
  std::fill(shares.begin(), shares.end(), DeviceShare{});
  if (page_size == 0 || shares.empty()) return 0;
  // By their tables: those with most in common are neighbours.
  std::vector<std::pair<int32_t, int32_t>> order;  // first page, piece
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].position >= kMinPositions) order.emplace_back(pieces[i].page_table[0], static_cast<int32_t>(i));
  }
  std::sort(order.begin(), order.end());
  const auto table = [&](int32_t piece) {
    return std::span(pieces[piece].page_table, pieces[piece].position / page_size);
  };
  for (auto begin = order.begin(); begin != order.end();) {
    const auto end = std::find_if(begin, order.end(), [&](const auto& o) { return o.first != begin->first; });
    if (end - begin > 2) {
      std::sort(begin, end, [&](const auto& a, const auto& b) {
        return std::ranges::lexicographical_compare(table(a.second), table(b.second));
      });
    }
    begin = end;
  }

  size_t used = 0;
  for (size_t i = 0; i < order.size() && used < shares.size();) {
    DeviceShare share;
    share.pieces[share.count++] = order[i].second;
    // A further piece is taken in if more is read once then than before.
    int64_t positions = 0;
    while (share.count < kSharePieces && i + share.count < order.size()) {
      const int32_t next = order[i + share.count].second;
      const Piece& last = pieces[share.pieces[share.count - 1]];
      int64_t common = SharedPositions(last, pieces[next], page_size);
      if (share.count > 1) common = std::min(common, positions);
      if (common < kMinPositions || common * share.count <= positions * (share.count - 1)) break;
      positions = common;
      share.pieces[share.count++] = next;
    }
    i += share.count;
    if (share.count < 2) continue;
    share.positions = static_cast<int32_t>(positions);
    shares[used++] = share;
  }
  return static_cast<int64_t>(used);
}

}  // namespace lockstep::cuda

// Which decode pieces of a batch attention takes together. Host code only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/batch.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

// The most shares that a batch of so many decode pieces is given.
constexpr int64_t MaxShares(int64_t decode_pieces) {
  return decode_pieces / 4;
}

// Finds shares, and remembers those of the last batch: from step to step a batch mostly stays the same sequences, each
// one position longer, whose shares need no search. One thread at a time.
class ShareFinder {
 public:
  // Fills `shares` from the front, padding what is left of it; returns how many it filled. `pieces`: of one row each.
  // Pieces that have a page in common have all pages before it in common too, or are not found. What was remembered
  // saves time only: the shares are those that a finder without memory gives.
  int64_t Find(std::span<const Piece> pieces, int64_t page_size, std::span<DeviceShare> shares);

  int64_t searches() const { return searches_; }  // batches whose shares were not those remembered

 private:
  // What the search saw of a piece: the pages that it has in common with its neighbours in the order of tables, and the
  // next one. As long as every piece's table begins with these, the order, and what neighbours have in common, stay.
  struct Seen {
    int64_t begin = 0;         // in pages_
    int64_t count = 0;         // 0: too short to share anything
    bool whole_table = false;  // the piece had no page after these: one more may change what it has in common
  };
  bool Remembers(std::span<const Piece> pieces, int64_t page_size, size_t room) const;
  void Search(std::span<const Piece> pieces, int64_t page_size, size_t room);

  int64_t page_size_ = 0;
  size_t room_ = 0;
  std::vector<Seen> seen_;  // by piece
  std::vector<int32_t> pages_;
  std::vector<DeviceShare> found_;
  int64_t searches_ = 0;
};

}  // namespace lockstep::cuda

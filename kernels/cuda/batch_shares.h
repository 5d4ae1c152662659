// Which decode pieces of a batch attention takes together. Host code only.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cuda/batch.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

// The most shares that a batch of so many decode pieces is given.
constexpr int64_t MaxShares(int64_t decode_pieces) {
  return decode_pieces / 4;
}

// Fills `shares` from the front, padding what is left of it; returns how many it filled. `pieces`: of one row each.
// Pieces that have a page in common have all pages before it in common too, or are not found.
int64_t FindShares(std::span<const Piece> pieces, int64_t page_size, std::span<DeviceShare> shares);

}  // namespace lockstep::cuda

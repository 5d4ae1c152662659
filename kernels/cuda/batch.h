// The rows of one step as the device sees them: what the sequence-wise kernels (convolution, GDN, attention) work from.
// The host fills the arrays; their addresses stay the same from step to step, so a captured graph sees each step's own.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

// The rows of one sequence: batch rows [row_begin, row_begin + row_count) are its positions [position, position +
// row_count).
struct DevicePiece {
  int32_t row_begin = 0;
  int32_t row_count = 0;  // 0: padding of a captured batch; no kernel may read or write anything for it
  int32_t position = 0;   // of the first row
  int32_t slot = 0;       // of the sequence's state: layer state at state_base + slot * slot_stride
  int32_t page_begin =
      0;  // its page table is DeviceBatch::pages[page_begin ...], ceil((position + row_count) / page_size) entries
  // Positions at the front that attention takes together with other decode pieces: those of its DeviceShare, 0 for
  // none.
  int32_t shared = 0;
};

// The part of a piece that lies in one aligned block of 64 positions: the unit of prefill work. Tiles of a piece are in
// ascending order and next to each other.
struct DeviceTile {
  int32_t piece = 0;
  int32_t row_begin = 0;  // batch row
  int32_t row_count = 0;  // 1 to 64; position / 64 == (position + row_count - 1) / 64. 0: padding, skip
  int32_t position = 0;   // of the first row
};

// Decode pieces whose page tables begin with the same pages: samples of one prompt. Attention reads those keys and
// values once for all of them. A piece is in one share at most.
constexpr int kSharePieces = 8;
struct DeviceShare {
  int32_t pieces[kSharePieces] = {};  // the first `count`
  int32_t count = 0;                  // 2 to 8; 0: padding, skip
  int32_t positions = 0;              // a multiple of 128, and no piece's position lies before them
};

// Device pointers; passed to kernels by value.
// Pieces [0, decode_pieces) have one row each and row_begin equals the piece's index (decode kernels take these);
// pieces [decode_pieces, pieces_count) are prefill pieces and are covered by `tiles`.
struct DeviceBatch {
  const DevicePiece* pieces = nullptr;  // [piece_count]
  const DeviceTile* tiles = nullptr;    // [tile_count], of the prefill pieces only
  const DeviceShare* shares = nullptr;  // [share_count], of the decode pieces only
  const int32_t* pages = nullptr;       // page tables, one after the other
  const int32_t* tokens = nullptr;      // [rows]
  const int32_t* positions = nullptr;   // [rows]
  const int32_t* row_piece = nullptr;   // [rows]: the piece of each row; -1: padding row
  int32_t rows = 0;
  int32_t piece_count = 0;
  int32_t decode_pieces = 0;
  int32_t tile_count = 0;
  int32_t share_count = 0;
};

}  // namespace lockstep::cuda

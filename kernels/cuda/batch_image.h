// A step's batch as the bytes that go to the device in one copy: what the host knows of the rows, in the arrays of
// DeviceBatch. Host code only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/batch.h"
#include "kernels/cuda/batch_shares.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

// Sizes of a batch's arrays. Arrays lie one after the other, page tables last, so that a recorded step, whose arrays
// must stay where they are, can have any number of pages.
struct BatchSizes {
  int64_t rows = 0;        // padding included
  int64_t logit_rows = 0;  // padding included
  int64_t pieces = 0;      // padding included
  int64_t decode_pieces = 0;
  int64_t tiles = 0;
  int64_t shares = 0;  // padding included; MaxShares() if attention is to share what it reads
  int64_t pages = 0;   // entries of all page tables

  // Byte offsets.
  int64_t pieces_at() const { return 0; }
  int64_t tiles_at() const;
  int64_t tokens_at() const;
  int64_t positions_at() const;
  int64_t row_piece_at() const;
  int64_t logit_rows_at() const;
  int64_t shares_at() const;
  int64_t pages_at() const;
  int64_t bytes() const;
};

// A batch with nothing padded and no shares. `page_size`: positions a page, 0 for a model without pages.
BatchSizes SizesOf(const StepBatch& batch, int64_t page_size);

// Whether a step over the batch is one that is recorded: decode rows only, each with its logits.
bool IsDecodeStep(const StepBatch& batch);
// The padded number of rows of a recorded step of `rows` rows; 0: too many to be recorded.
int64_t RecordedRows(int64_t rows);
constexpr int64_t kMaxRecordedRows = 256;
// The sizes of a recorded step of `rows` (padded) rows, without shares.
BatchSizes RecordedSizes(int64_t rows, int64_t pages);

// Writes the batch's arrays, padding included, to `image` [sizes.bytes()]. Returns the number of shares that were found
// and had room. `finder`: the same from step to step, to save searches.
int64_t WriteBatchImage(const StepBatch& batch, const BatchSizes& sizes, int64_t page_size, ShareFinder& finder,
                        std::byte* image);

// The shares of an image on the host.
std::vector<AttentionShare> SharesOf(const std::byte* image, const BatchSizes& sizes);

// The arrays of an image that lies at `base` on the device.
DeviceBatch BatchAt(const std::byte* base, const BatchSizes& sizes);
const int32_t* LogitRowsAt(const std::byte* base, const BatchSizes& sizes);

}  // namespace lockstep::cuda

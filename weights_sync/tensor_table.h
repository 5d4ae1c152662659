// The tensors a worker's weights are made of, and a second place to put new ones. weights_sync knows these, not a
// model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/numerics.h"

namespace lockstep {

struct TensorSlot {
  std::string name;  // as transformers' state_dict has it
  std::vector<int64_t> shape;
  DType held = DType::kF32;          // what values are rounded to on arrival
  std::vector<std::string> aliases;  // other names of the same tensor
  // Names of tensors that, stacked along the first dimension, are this one; and the row counts they may have, one list
  // per accepted cut.
  std::vector<std::string> parts;
  std::vector<std::vector<int64_t>> part_rows;
  // Shares the values of another slot, by its index (a tied head); may be absent from a manifest. -1: its own.
  int64_t tied_to = -1;
};

// Rows of one slot as a sender holds them.
struct ArrivedRows {
  size_t slot = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  const std::byte* data = nullptr;  // [rows, elements of a row], contiguous, aligned to 8 bytes
  DType dtype = DType::kF32;
};

// BeginUpdate, Stage and Finish are called one at a time, from any thread; the rest at any time.
class TensorTable {
 public:
  virtual ~TensorTable() = default;
  virtual std::span<const TensorSlot> slots() const = 0;
  // Forgets what was staged.
  virtual void BeginUpdate() = 0;
  // Converts the rows to the slot's held dtype and puts them into the second place. `data` is free on return.
  virtual absl::Status Stage(const ArrivedRows& rows) = 0;
  // All that was staged is in place.
  virtual absl::Status Finish() = 0;
  // Digests of the slots' values that serve, in the held dtype.
  virtual absl::StatusOr<std::vector<uint64_t>> ServingDigests() = 0;
};

}  // namespace lockstep

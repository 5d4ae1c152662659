// The tensors a worker's weights are made of, and where new ones go: a second place, or that of those that serve.
// weights_sync knows these, not a model.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/numerics.h"
#include "weights_sync/version.h"

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

// Of the values that serve, in the held dtype.
struct VersionDigests {
  WeightVersion version;
  std::vector<uint64_t> digests;  // by slot
};

// Rows of one slot as a sender holds them.
struct ArrivedRows {
  size_t slot = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  const std::byte* data = nullptr;  // [rows, elements of a row], contiguous, aligned to 8 bytes
  DType dtype = DType::kF32;
  uint64_t digest = 0;  // of the data
};

// A run of one tensor's values in a buffer of an inbox.
struct ArrivedPiece {
  size_t tensor = 0;  // of those that the inbox was opened for
  int64_t index = 0;  // of the first value in the tensor as sent
  int64_t count = 0;
  int64_t offset = 0;  // bytes, in the buffer
};

// What has arrived of a tensor.
struct ArrivedTensor {
  uint64_t digest = 0;  // of its bytes as sent
  int64_t non_finite = 0;
};

// A tensor that will arrive.
struct ExpectedTensor {
  size_t slot = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  DType dtype = DType::kF32;
};

// Buffers that a transport fills by itself (NCCL), beside the steps. For buffers 0 and 1 in turn: Acquire, the
// transport's work on stream(), Stage. Used by one thread at a time; nothing waits.
class TensorInbox {
 public:
  virtual ~TensorInbox() = default;
  virtual int64_t buffer_bytes() const = 0;
  virtual std::byte* buffer(int which) = 0;
  // A cudaStream_t; null: host memory, where the transport's work is done when its call is.
  virtual void* stream() = 0;
  // Makes the device the calling thread's.
  virtual absl::Status UseOnThisThread() = 0;

  // Of which these will arrive. Drops what is there. INVALID_ARGUMENT: a tensor cannot come this way.
  virtual absl::Status Open(std::vector<ExpectedTensor> tensors) = 0;
  virtual absl::Status Acquire(int which) = 0;
  virtual absl::Status Stage(int which, std::span<const ArrivedPiece> pieces) = 0;
  // Whether all that was asked for has happened.
  virtual absl::StatusOr<bool> Idle() = 0;
  // Once all values have come and it is idle: they are the table's staged values. By tensor.
  virtual absl::StatusOr<std::vector<ArrivedTensor>> Close() = 0;
};

// A copy, in host memory, of the version that serves, for tables whose new values take its place as they arrive.
// Restore and Write are called one at a time, by one thread, and neither while Stage or an open inbox is at work.
class TensorShadow {
 public:
  virtual ~TensorShadow() = default;
  // What was staged since BeginUpdate has never been: what serves is that of before in every bit, read back and
  // compared. No step may run. CANCELLED: as asked. Any other error: what serves is no version's.
  virtual absl::Status Restore(const std::atomic<bool>& cancelled) = 0;
  // What was staged since BeginUpdate is what serves, and what the next Restore brings back. Steps may run. CANCELLED:
  // as asked. Any other error: the device failed, or what serves is not what was staged.
  virtual absl::Status Write(const std::atomic<bool>& cancelled) = 0;

  // Of the Restore or Write that goes on, or went on last. At any time.
  struct Progress {
    int64_t done = 0, total = 0;  // bytes
  };
  virtual Progress progress() const = 0;
};

// BeginUpdate, Stage and Finish are called one at a time, from any thread; the rest at any time.
class TensorTable {
 public:
  virtual ~TensorTable() = default;
  virtual std::span<const TensorSlot> slots() const = 0;
  // Forgets what was staged.
  virtual void BeginUpdate() = 0;
  // Null: there is a second place, and what serves stays untouched. Else no step may run from the first Stage, or the
  // inbox's, to the update's commit or the shadow's Restore.
  virtual TensorShadow* shadow() { return nullptr; }
  // Converts the rows to the slot's held dtype and puts them where new values go. `data` is free on return.
  virtual absl::Status Stage(const ArrivedRows& rows) = 0;
  // For transports that fill memory themselves; null: there is none. Between BeginUpdate and Finish.
  virtual TensorInbox* inbox() = 0;
  // All that was staged is in place.
  virtual absl::Status Finish() = 0;
  // All of one version, also while another is put in its place.
  virtual absl::StatusOr<VersionDigests> ServingDigests() = 0;
};

}  // namespace lockstep

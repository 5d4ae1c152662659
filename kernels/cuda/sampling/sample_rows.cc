#include "kernels/cuda/sampling/sample_rows.h"

#include "kernels/cuda/params.h"
#include "sampler/mass.h"

namespace lockstep::cuda {
namespace {

constexpr int kMaxBlocksPerTask = 8;
constexpr uintptr_t kRowAlignment = 16;
constexpr int64_t kStrideMultiple = 8;  // elements that a lane loads at once

}  // namespace

absl::Status SampleRowsParams::Validate() const {
  constexpr int64_t kMaxTasks = INT32_MAX / kMaxBlocksPerTask;
  if (count < 0 || count > kMaxTasks) return BadField("SampleRowsParams.count", count, "0 to 2^28 - 1");
  if (vocab < 1 || vocab > kMaxVocabSize) return BadField("SampleRowsParams.vocab", vocab, "1 to 262144");
  if (absl::Status status = CheckPointer("SampleRowsParams.logits", logits, kRowAlignment); !status.ok()) return status;
  if (absl::Status status = CheckStride("SampleRowsParams.logits_stride", logits_stride, vocab, kStrideMultiple);
      !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckPointer("SampleRowsParams.tasks", tasks, alignof(DeviceTask)); !status.ok()) {
    return status;
  }
  return CheckPointer("SampleRowsParams.results", results, alignof(DeviceResult));
}

int SampleBlocksPerTask(int64_t count, int multiprocessors) {
  int blocks = kMaxBlocksPerTask;
  while (blocks > 1 && count * blocks > multiprocessors) blocks /= 2;
  return blocks;
}

}  // namespace lockstep::cuda

// From RowTasks to what the kernels read at one step: parameters in their units, what penalties and masks say of the
// tokens so far, places in the output. A request's lists are the same at every step: token_lists.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/sampling/device_task.h"
#include "sampler/row_sampler.h"

namespace lockstep::cuda {

struct PackedTask {
  DeviceTask device;        // without its pointers
  bool adjusted = false;    // penalties, bias or masks may change its logits
  int64_t penalties = 0;    // index of its first penalty, of device.penalty_count
  int64_t masked = 0;       // index of its first masked token, of device.masked_count
  int64_t lists = 0;        // index of its first list entry
  bool keeps_bits = false;  // whether its kept tokens are asked for
  int64_t kept = 0;         // offset of their bits
};

// The tokens whose bits are set in DeviceTask::kept, ascending. Those past the vocabulary never are.
std::vector<int32_t> KeptTokens(std::span<const std::byte> bits);

class TaskPacker {
 public:
  explicit TaskPacker(int64_t vocab) : vocab_(vocab) {}

  // Starts anew.
  void Pack(std::span<const SampleTask> tasks);

  std::vector<PackedTask>& tasks() { return tasks_; }
  const std::vector<TokenPenalty>& penalties() const { return penalties_; }
  const std::vector<int32_t>& masked() const { return masked_; }
  int64_t list_entries() const { return list_entries_; }
  int64_t kept_bytes() const { return kept_bytes_; }

 private:
  PackedTask PackOne(const SampleTask& sample);
  void PackAdjustments(const RowTask& task, PackedTask& packed);
  void Mask(int32_t token);

  const int64_t vocab_;
  std::vector<PackedTask> tasks_;
  std::vector<TokenPenalty> penalties_;  // of all tasks
  std::vector<int32_t> masked_;          // of all tasks; of one task a token may come twice
  int64_t list_entries_ = 0;
  int64_t kept_bytes_ = 0;
};

}  // namespace lockstep::cuda

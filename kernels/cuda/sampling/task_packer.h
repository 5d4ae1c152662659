// From RowTasks to what the kernels read: parameters in their units, edits a token at most once, places in the output.
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
  bool adjusted = false;    // has edits, in [edits, edits + device.edit_count)
  int64_t edits = 0;        // index of its first edit
  int64_t lists = 0;        // index of its first list entry
  bool keeps_bits = false;  // whether its kept tokens are asked for
  int64_t kept = 0;         // offset of their bits
};

// The tokens whose bits are set in DeviceTask::kept, ascending. Those past the vocabulary never are.
std::vector<int32_t> KeptTokens(std::span<const std::byte> bits);

class TaskPacker {
 public:
  explicit TaskPacker(int64_t vocab) : vocab_(vocab), place_(vocab, -1) {}

  // Starts anew.
  void Pack(std::span<const SampleTask> tasks);

  std::vector<PackedTask>& tasks() { return tasks_; }
  const std::vector<LogitEdit>& edits() const { return edits_; }
  int64_t list_entries() const { return list_entries_; }
  int64_t kept_bytes() const { return kept_bytes_; }

 private:
  PackedTask PackOne(const SampleTask& sample);
  void PackEdits(const RowTask& task, PackedTask& packed);
  LogitEdit& EditOf(int32_t token);

  const int64_t vocab_;
  std::vector<PackedTask> tasks_;
  std::vector<LogitEdit> edits_;  // of all tasks
  std::vector<int64_t> place_;    // by token: its edit of the current task; -1: none
  int64_t list_entries_ = 0;
  int64_t kept_bytes_ = 0;
};

}  // namespace lockstep::cuda

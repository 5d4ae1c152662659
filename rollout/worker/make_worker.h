// From a checkpoint directory and options to something that serves. The only place that knows how engine, model and
// worker are put together.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/numerics.h"
#include "rollout/model/spec.h"
#include "rollout/worker/model_tensors.h"
#include "rollout/worker/request.h"
#include "weights_sync/tensor_table.h"

namespace lockstep {

// Set from the worker's flags; rollout/server/flags.cc documents each for users.
struct WorkerOptions {
  std::filesystem::path model_dir;
  std::string backend = "cpu";
  std::string
      numerics;     // profile name; empty: for a bfloat16 checkpoint "hf-torch" on cpu and "hf" on cuda, else "fp32"
  int threads = 0;  // 0: the cores this process may use
  int cuda_device = 0;
  bool cuda_graphs = true;  // record decode steps and replay them
  // cuda: decode reads the keys and values that sequences share once for all.
  bool shared_prefix_attention = true;
  double memory_gb = 0;        // for KV pages and state slots, 1e9 bytes; 0: by memory_fraction
  double memory_fraction = 0;  // of the memory that is free once the weights are loaded; 0: 0.5 on cpu, 0.9 on cuda
  int64_t page_size = 64;      // tokens per KV page
  // Decode rows and prefill tokens of one step; 0: 512 on cpu, 4096 on cuda, or max_sequences if that is more.
  int64_t max_batch_tokens = 0;
  // Of a step in which most sequences decode (SchedulerConfig); 0: max_batch_tokens on cpu, 512 on cuda.
  int64_t mixed_batch_tokens = 0;
  // Running at once, at most max_batch_tokens; 0: 64 on cpu, 256 on cuda, or max_batch_tokens if that is less.
  int64_t max_sequences = 0;
  int64_t max_waiting_sequences = 4096;
  absl::Duration step_timeout;  // past which a step's device counts as failed; 0: none on cpu, 120 s on cuda
  // kStaged keeps memory for a second set of weights, kDirect host memory for a copy; both for buffers of broadcasts
  WeightsReceive weights_receive = WeightsReceive::kStaged;
};

struct ServingModel {
  std::unique_ptr<WorkerInterface> worker;
  // Of `worker`, and what it stands on; null: it cannot be held (a fake one), its weights stay as they are.
  WorkerControl* control = nullptr;
  TensorTable* tensors = nullptr;
  WeightsReceive weights_receive = WeightsReceive::kOff;
  // What is staged in `tensors`, as that version; for WorkerControl::SwitchWeights.
  std::function<absl::Status(const WeightVersion&)> install_weights;
  std::string name;  // last component of the checkpoint's path
  ModelSpec spec;
  NumericsProfile profile{};
  std::string device;          // for people
  bool has_tokenizer = false;  // stop strings can be matched
  int64_t max_sequence_tokens =
      0;  // prompt and completion: what the model and the memory allow, at most spec.max_position
};

// INVALID_ARGUMENT, NOT_FOUND or UNIMPLEMENTED name the flag or file at fault.
absl::StatusOr<ServingModel> MakeWorker(const WorkerOptions& options);

}  // namespace lockstep

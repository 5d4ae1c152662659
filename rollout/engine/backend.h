// A backend: where the model runs. The CPU is always there; CUDA if the build has it and the machine a GPU for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/numerics.h"
#include "kernels/ops.h"
#include "rollout/base/thread_pool.h"
#include "rollout/model/spec.h"
#include "sampler/row_sampler.h"

namespace lockstep {

struct BackendOptions {
  std::string name = "cpu";             // "cpu" or "cuda"
  int device = 0;                       // CUDA device ordinal
  bool cuda_graphs = true;              // record decode steps and replay them
  bool shared_prefix_attention = true;  // cuda: decode reads the keys and values that sequences share once for all
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string device() const = 0;  // for people: "NVIDIA H200 (sm_90, 141 GB)"
  virtual Ops& ops() = 0;
  // INVALID_ARGUMENT, naming config.json's field, for a model that it has no kernels for.
  virtual absl::Status CheckModel(const ModelSpec&) const { return absl::OkStatus(); }
  // Bytes per second between the device and its memory, measured now: what floors are computed from. On a CPU the reads
  // of all threads, on a GPU the reads and writes of a copy.
  virtual absl::StatusOr<double> MeasureBandwidth() = 0;
  // For rows of `vocab` logits, of at most `requests` requests in a step. The backend must outlive it.
  virtual absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t vocab, int64_t requests) = 0;
  // Device memory that a sampler holds for each of `requests`.
  virtual int64_t SamplerBytesPerRequest(int64_t) const { return 0; }
};

// `threads` must outlive it. INVALID_ARGUMENT for an unknown name; UNIMPLEMENTED for "cuda" in a build without it;
// FAILED_PRECONDITION, saying what is there and what is needed, where the machine has no GPU this build runs on.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options, const NumericsProfile& profile,
                                                     ThreadPool* threads);
std::unique_ptr<Backend> MakeCpuBackend(const NumericsProfile& profile, ThreadPool* threads);

}  // namespace lockstep

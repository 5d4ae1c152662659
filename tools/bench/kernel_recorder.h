// Every kernel the device runs, with its times, by CUPTI's activity records. Recording slows steps down.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "tools/bench/cupti_library.h"

namespace lockstep {

struct KernelLaunch {
  std::string name;             // mangled
  uint64_t start = 0, end = 0;  // ns
};

// One in a process; used by one thread (CUPTI hands its buffers over on another).
class KernelRecorder {
 public:
  // Recording begins. Steps that a backend has recorded before must be recorded anew: kernels of a graph from before
  // may be missed.
  static absl::StatusOr<KernelRecorder> Start(const CuptiLibrary& library);
  // What ran since the last call, in order of start; the device is idle. INTERNAL if CUPTI lost some.
  absl::StatusOr<std::vector<KernelLaunch>> Take();
  absl::Status Stop();

 private:
  explicit KernelRecorder(const CuptiLibrary& library) : library_(library) {}
  CuptiLibrary library_;
};

}  // namespace lockstep

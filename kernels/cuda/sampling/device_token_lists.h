// Requests' token lists on the device: sent once, when a step first needs them, and read from there at every step.
//
// All copies and all kernels that read them are on one stream, so a place that is taken again is overwritten after the
// last step that read it. What copies come from belongs to the caller's step and stays until that has ended.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/sampling/device_task.h"
#include "kernels/cuda/sampling/list_places.h"
#include "sampler/row_sampler.h"

namespace lockstep::cuda {

class DeviceTokenLists {
 public:
  // Room for the longest lists of `requests` requests; RESOURCE_EXHAUSTED if the device has none.
  static absl::StatusOr<std::unique_ptr<DeviceTokenLists>> Create(int64_t vocab, int64_t requests);

  // Points `device` to the lists of task's request, if it has any. Those not there yet come with the next Send.
  void Place(const RowTask& task, DeviceTask& device);
  // Sends what was placed since the last call, through `staging`, which grows to what it takes and is the copies' until
  // the step has ended.
  absl::Status Send(PinnedMemory& staging, cudaStream_t stream);
  void Forget(uint64_t request) { places_.Forget(request); }
  void EndStep() { places_.EndStep(); }

 private:
  struct Fresh {
    const SamplingParams* params;
    std::byte* to;
  };

  DeviceTokenLists(int64_t vocab, int64_t requests, std::unique_ptr<CudaMemory> memory)
      : vocab_(vocab), memory_(std::move(memory)), places_(requests), params_(requests) {}

  const int64_t vocab_;
  const std::unique_ptr<CudaMemory> memory_;  // [requests, MaxTokenListBytes(vocab)]
  ListPlaces places_;
  std::vector<const SamplingParams*> params_;  // by place: whose lists they are
  std::vector<Fresh> fresh_;                   // not sent yet
};

}  // namespace lockstep::cuda

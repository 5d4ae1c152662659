#include "kernels/cuda/weight_inbox.h"

#include "kernels/cuda/store_values.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep::cuda {

absl::StatusOr<std::unique_ptr<CudaWeightInbox>> CudaWeightInbox::Create(int64_t buffer_bytes, int64_t tallies) {
  std::unique_ptr<CudaWeightInbox> inbox(new CudaWeightInbox(buffer_bytes, tallies));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&inbox->device_), "cudaGetDevice"));
  LOCKSTEP_ASSIGN_OR_RETURN(inbox->buffers_, CudaMemory::Allocate(2 * buffer_bytes));
  LOCKSTEP_ASSIGN_OR_RETURN(inbox->tallies_, CudaMemory::AllocateZeroed(tallies * int64_t{sizeof(ValueTally)}));
  int lowest = 0, highest = 0;
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange"));
  for (cudaStream_t* stream : {&inbox->transport_, &inbox->convert_}) {
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, lowest), "cudaStreamCreate"));
  }
  for (cudaEvent_t* event : {&inbox->arrived_, &inbox->released_[0], &inbox->released_[1]}) {
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  }
  return inbox;
}

CudaWeightInbox::~CudaWeightInbox() {
  for (cudaStream_t stream : {transport_, convert_}) {
    if (stream == nullptr) continue;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  for (cudaEvent_t event : {arrived_, released_[0], released_[1]}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

absl::Status CudaWeightInbox::UseOnThisThread() {
  return CudaStatus(cudaSetDevice(device_), "cudaSetDevice");
}

absl::Status CudaWeightInbox::Reset() {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(transport_), "weights over NCCL"));
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaMemsetAsync(tallies_->data(), 0, tallies_->bytes(), convert_), "cudaMemsetAsync"));
  return CudaStatus(cudaStreamSynchronize(convert_), "weights over NCCL");
}

absl::Status CudaWeightInbox::Acquire(int which) {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  return CudaStatus(cudaStreamWaitEvent(transport_, released_[which], 0), "cudaStreamWaitEvent");
}

absl::Status CudaWeightInbox::Arrived() {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventRecord(arrived_, transport_), "cudaEventRecord"));
  return CudaStatus(cudaStreamWaitEvent(convert_, arrived_, 0), "cudaStreamWaitEvent");
}

absl::Status CudaWeightInbox::Store(const InboxValues& values, WeightStage& stage) {
  const int64_t size = values.count * DTypeBytes(values.stored);
  LOCKSTEP_CHECK(values.tally < tally_count_, "tally {} of {}", values.tally, tally_count_);
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  auto* tallies = reinterpret_cast<ValueTally*>(tallies_->data());
  return LaunchStoreValues({.from = values.from,
                            .sent = values.sent,
                            .count = values.count,
                            .sent_index = values.sent_index,
                            .held_index = values.held_index,
                            .held = values.held,
                            .to = stage.Address(values.to, size),
                            .stored = values.stored,
                            .tally = values.tally < 0 ? nullptr : tallies + values.tally},
                           convert_);
}

absl::Status CudaWeightInbox::Release(int which) {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  return CudaStatus(cudaEventRecord(released_[which], convert_), "cudaEventRecord");
}

absl::StatusOr<bool> CudaWeightInbox::Idle() {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  for (cudaStream_t stream : {transport_, convert_}) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaErrorNotReady) return false;
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(state, "weights over NCCL"));
  }
  return true;
}

absl::StatusOr<std::vector<ValueTally>> CudaWeightInbox::Tallies() {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  std::vector<ValueTally> tallies(tally_count_);
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(tallies.data(), tallies_->data(), tallies_->bytes(), cudaMemcpyDeviceToHost, convert_),
                 "cudaMemcpyAsync"));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(convert_), "weights over NCCL"));
  return tallies;
}

}  // namespace lockstep::cuda

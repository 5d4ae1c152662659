#include "kernels/cuda/weight_stage.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cuda/store_values.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kBufferBytes = int64_t{4} << 20;  // the wire takes one while the host copies another

}  // namespace

absl::Status CudaWeightStage::Open(Way& way) {
  int lowest = 0, highest = 0;
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange"));
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithPriority(&way.stream, cudaStreamNonBlocking, lowest), "cudaStreamCreate"));
  for (Buffer& buffer : way.buffers) {
    LOCKSTEP_ASSIGN_OR_RETURN(buffer.memory, PinnedMemory::Allocate(kBufferBytes));
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  }
  return absl::OkStatus();
}

absl::Status CudaWeightStage::Init() {
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device_), "cudaGetDevice"));
  return Open(up_);
}

absl::StatusOr<std::unique_ptr<CudaWeightStage>> CudaWeightStage::Create(int64_t bytes) {
  std::unique_ptr<CudaWeightStage> stage(new CudaWeightStage);
  LOCKSTEP_RETURN_IF_ERROR(stage->Init());
  LOCKSTEP_ASSIGN_OR_RETURN(stage->memory_, CudaMemory::Allocate(bytes));
  stage->regions_ = {{.offset = 0, .bytes = bytes, .data = stage->memory_->data()}};
  return stage;
}

absl::StatusOr<std::unique_ptr<CudaWeightStage>> CudaWeightStage::CreateLive(std::vector<StageRegion> regions) {
  std::unique_ptr<CudaWeightStage> stage(new CudaWeightStage);
  LOCKSTEP_RETURN_IF_ERROR(stage->Init());
  LOCKSTEP_RETURN_IF_ERROR(Open(stage->down_));
  LOCKSTEP_ASSIGN_OR_RETURN(stage->tally_, CudaMemory::Allocate(sizeof(ValueTally)));
  stage->regions_ = std::move(regions);
  return stage;
}

CudaWeightStage::~CudaWeightStage() {
  for (Way* way : {&up_, &down_}) {
    if (way->stream == nullptr) continue;
    cudaStreamSynchronize(way->stream);
    for (Buffer& buffer : way->buffers) {
      if (buffer.copied != nullptr) cudaEventDestroy(buffer.copied);
    }
    cudaStreamDestroy(way->stream);
  }
}

int64_t CudaWeightStage::bytes() const {
  return regions_.empty() ? 0 : regions_.back().offset + regions_.back().bytes;
}

std::byte* CudaWeightStage::Address(int64_t offset, int64_t bytes) {
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), offset,
                                      [](int64_t at, const StageRegion& region) { return at < region.offset; });
  LOCKSTEP_CHECK(after != regions_.begin(), "{} bytes at {} are in no region", bytes, offset);
  const StageRegion& region = *std::prev(after);
  LOCKSTEP_CHECK(bytes <= region.bytes - (offset - region.offset), "{} bytes at {}: the region ends at {}", bytes,
                 offset, region.offset + region.bytes);
  return region.data + (offset - region.offset);
}

absl::Status CudaWeightStage::Write(int64_t offset, std::span<const std::byte> data) {
  const int64_t size = static_cast<int64_t>(data.size());
  std::byte* const to = Address(offset, size);
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  for (int64_t done = 0; done < size; up_.turn ^= 1) {
    Buffer& buffer = up_.buffers[up_.turn];
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(buffer.copied), "weights to the device"));
    const int64_t count = std::min(kBufferBytes, size - done);
    std::memcpy(buffer.memory.data(), data.data() + done, count);
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(to + done, buffer.memory.data(), count, cudaMemcpyHostToDevice, up_.stream),
                   "weights to the device"));
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventRecord(buffer.copied, up_.stream), "weights to the device"));
    done += count;
  }
  return absl::OkStatus();
}

absl::Status CudaWeightStage::Finish() {
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  return CudaStatus(cudaStreamSynchronize(up_.stream), "weights to the device");
}

absl::Status CudaWeightStage::Read(int64_t offset, std::span<std::byte> to) {
  LOCKSTEP_CHECK(down_.stream != nullptr, "only weights in use are read");
  const int64_t size = static_cast<int64_t>(to.size());
  const std::byte* const from = Address(offset, size);
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  const int64_t pieces = (size + kBufferBytes - 1) / kBufferBytes;
  const auto bytes_of = [&](int64_t piece) { return std::min(kBufferBytes, size - piece * kBufferBytes); };
  const auto ask = [&](int64_t piece) -> absl::Status {
    Buffer& buffer = down_.buffers[piece % 2];
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(buffer.memory.data(), from + piece * kBufferBytes,
                                                        bytes_of(piece), cudaMemcpyDeviceToHost, down_.stream),
                                        "weights from the device"));
    return CudaStatus(cudaEventRecord(buffer.copied, down_.stream), "weights from the device");
  };
  // The device copies the next piece while the host takes the last.
  if (pieces > 0) LOCKSTEP_RETURN_IF_ERROR(ask(0));
  for (int64_t piece = 0; piece < pieces; ++piece) {
    if (piece + 1 < pieces) LOCKSTEP_RETURN_IF_ERROR(ask(piece + 1));
    Buffer& buffer = down_.buffers[piece % 2];
    LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(buffer.copied), "weights from the device"));
    std::memcpy(to.data() + piece * kBufferBytes, buffer.memory.data(), bytes_of(piece));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> CudaWeightStage::SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) {
  LOCKSTEP_CHECK(tally_ != nullptr, "only weights in use are summed");
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_), "cudaSetDevice"));
  auto* const tally = reinterpret_cast<ValueTally*>(tally_->data());
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaMemsetAsync(tally, 0, sizeof(*tally), down_.stream), "SumInUse"));
  // Of words alone: values of 2 bytes, whatever they are.
  LOCKSTEP_RETURN_IF_ERROR(LaunchStoreValues({.from = Address(offset, bytes),
                                              .sent = DType::kBF16,
                                              .count = bytes / 2,
                                              .sent_index = static_cast<int64_t>(first_word) * 4,
                                              .held_index = static_cast<int64_t>(first_word) * 4,
                                              .held = DType::kBF16,
                                              .stored = DType::kBF16,
                                              .tally = tally},
                                             down_.stream));
  auto* const host = reinterpret_cast<ValueTally*>(down_.buffers[0].memory.data());
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(host, tally, sizeof(*host), cudaMemcpyDeviceToHost, down_.stream), "SumInUse"));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(down_.stream), "SumInUse"));
  return host->sent_sum;
}

}  // namespace lockstep::cuda

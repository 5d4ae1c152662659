#include "rollout/engine/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/sampling/device_sampler.h"
#include "rollout/base/status.h"
#include "rollout/engine/cuda_model_check.h"

namespace lockstep {
namespace {

constexpr int kMajor = 9, kMinor = 0;  // sm_90a: Hopper's own instructions run nowhere else

std::string VersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// The device's description, or why this build cannot use it.
absl::StatusOr<std::string> DescribeDevice(int device) {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("--backend cuda: no NVIDIA driver is loaded; want a driver for CUDA ", VersionText(runtime),
                     " and a Hopper GPU"));
  }
  // A driver of the same major version runs what a newer toolkit built.
  if (driver / 1000 < runtime / 1000) {
    return absl::FailedPreconditionError(absl::StrCat("--backend cuda: the driver supports CUDA ", VersionText(driver),
                                                      ", this build needs ", VersionText(runtime / 1000 * 1000),
                                                      " or newer"));
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return absl::FailedPreconditionError(absl::StrCat("--backend cuda: no GPU is visible (",
                                                      error == cudaSuccess ? "none found" : cudaGetErrorString(error),
                                                      "); want a Hopper GPU"));
  }
  if (device < 0 || device >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("--cuda_device: value ", device, " is out of range; want 0 to ", count - 1));
  }
  cudaDeviceProp properties;
  LOCKSTEP_RETURN_IF_ERROR(cuda::CudaStatus(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties"));
  if (properties.major != kMajor || properties.minor != kMinor) {
    return absl::FailedPreconditionError(absl::StrCat(
        "--backend cuda: GPU ", device, " is a ", properties.name, " (compute capability ", properties.major, ".",
        properties.minor, "); this build runs on Hopper, ", kMajor, ".", kMinor, ", alone"));
  }
  return absl::StrFormat("%s (sm_90, %.0f GB)", properties.name, static_cast<double>(properties.totalGlobalMem) * 1e-9);
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<cuda::CudaOps> ops, std::string device)
      : ops_(std::move(ops)), device_(std::move(device)) {}

  std::string device() const override { return device_; }
  Ops& ops() override { return *ops_; }
  absl::Status CheckModel(const ModelSpec& spec) const override { return CheckCudaModel(spec); }
  absl::StatusOr<double> MeasureBandwidth() override;
  absl::StatusOr<std::unique_ptr<RowSampler>> MakeSampler(int64_t vocab, int64_t requests) override;
  int64_t SamplerBytesPerRequest(int64_t vocab) const override { return cuda::DeviceSamplerBytesPerRequest(vocab); }

 private:
  std::unique_ptr<cuda::CudaOps> ops_;
  std::string device_;
};

// Bytes read and written by a large copy within the device.
absl::StatusOr<double> CudaBackend::MeasureBandwidth() {
  constexpr int64_t kBytes = int64_t{1} << 30;
  constexpr int kPasses = 5;
  LOCKSTEP_ASSIGN_OR_RETURN(const auto from, cuda::CudaMemory::Allocate(kBytes));
  LOCKSTEP_ASSIGN_OR_RETURN(const auto to, cuda::CudaMemory::Allocate(kBytes));
  cudaEvent_t begin = nullptr, end = nullptr;
  LOCKSTEP_RETURN_IF_ERROR(cuda::CudaStatus(cudaEventCreate(&begin), "cudaEventCreate"));
  LOCKSTEP_RETURN_IF_ERROR(cuda::CudaStatus(cudaEventCreate(&end), "cudaEventCreate"));
  float best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    cudaEventRecord(begin, ops_->stream());
    ops_->Copy(to->data(), from->data(), kBytes);
    cudaEventRecord(end, ops_->stream());
    ops_->Synchronize();
    float ms = 0;
    LOCKSTEP_RETURN_IF_ERROR(cuda::CudaStatus(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime"));
    if (pass == 0 || ms < best) best = ms;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  LOCKSTEP_RETURN_IF_ERROR(ops_->status());
  return 2.0 * static_cast<double>(kBytes) / (best * 1e-3);
}

absl::StatusOr<std::unique_ptr<RowSampler>> CudaBackend::MakeSampler(int64_t vocab, int64_t requests) {
  return cuda::MakeDeviceSampler({.vocab = vocab, .requests = requests, .stream = ops_->stream()});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options, const NumericsProfile& profile,
                                                         ThreadPool* threads) {
  LOCKSTEP_ASSIGN_OR_RETURN(std::string device, DescribeDevice(options.device));
  LOCKSTEP_ASSIGN_OR_RETURN(std::unique_ptr<cuda::CudaOps> ops,
                            cuda::CudaOps::Create(profile, threads,
                                                  {.device = options.device,
                                                   .graphs = options.cuda_graphs,
                                                   .shared_prefix_attention = options.shared_prefix_attention}));
  return std::make_unique<CudaBackend>(std::move(ops), std::move(device));
}

}  // namespace lockstep

// What invariance_test.cc shows of the CPU backend, of the CUDA backend: recorded steps and launched ones, decode and
// prefill, any schedule, the same bits. Skips without a GPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "tests/property/schedules.h"
#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

class CudaInvariance : public ::testing::TestWithParam<ModelKind> {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

TEST_P(CudaInvariance, GenerateEqualsItselfAndScoreUnderRandomSchedules) {
  Tally tally;
  for (const std::string numerics : {"hf", "hf-masked", "hf-flash", "hf-autocast", "olmo-core"}) {
    SCOPED_TRACE(numerics);
    // Models come and go: memory that is given out again holds another's values.
    const uint64_t seed = 1;
    const auto recorded = MakeRandomModel(GetParam(), numerics, seed, 2,
                                          {.name = "cuda", .cuda_graphs = true, .shared_prefix_attention = true});
    const auto launched = MakeRandomModel(GetParam(), numerics, seed, 2,
                                          {.name = "cuda", .cuda_graphs = false, .shared_prefix_attention = false});
    CheckInvariance(*launched, *recorded, seed, 4, tally);
    if (HasFatalFailure()) return;
  }
  std::printf("%ld schedules, %ld generated tokens compared, %ld scored, %ld preemptions, %ld forked samples\n",
              static_cast<long>(tally.schedules), static_cast<long>(tally.tokens), static_cast<long>(tally.scored),
              static_cast<long>(tally.preemptions), static_cast<long>(tally.forked));
}

INSTANTIATE_TEST_SUITE_P(Models, CudaInvariance, ::testing::ValuesIn(AllModelKinds()));

}  // namespace
}  // namespace lockstep

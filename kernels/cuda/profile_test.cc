// Which profiles the CUDA backend has programs for. Needs no GPU: a profile is looked at before the device is.
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_ops.h"

namespace lockstep::cuda {
namespace {

using ::testing::HasSubstr;

// Empty if the profile is not refused, whatever the device says.
std::string Refusal(const NumericsProfile& profile) {
  ThreadPool pool(1);
  const absl::Status status = CudaOps::Create(profile, &pool, {}).status();
  return status.code() == absl::StatusCode::kInvalidArgument ? std::string(status.message()) : "";
}

TEST(CudaProfiles, ThoseOfATrainerOnAGpuAreTaken) {
  for (const char* name : {"hf", "hf-masked", "hf-flash", "hf-autocast", "hf-autocast-masked", "olmo-core"}) {
    EXPECT_EQ(Refusal(FindNumericsProfile(name).value()), "") << name;
  }
}

TEST(CudaProfiles, ARefusalNamesTheField) {
  EXPECT_THAT(Refusal(FindNumericsProfile("hf-torch").value()), HasSubstr("\"hf-torch\", field gdn"));
  EXPECT_THAT(Refusal(FindNumericsProfile("fp32").value()), HasSubstr("\"fp32\", field weights"));
  NumericsProfile p = FindNumericsProfile("hf").value();
  p.residual = DType::kF32;
  EXPECT_THAT(Refusal(p), HasSubstr("field embedding"));
  p.embedding = p.norm_weights = DType::kF32;
  EXPECT_THAT(Refusal(p), HasSubstr("field gated_norm"));
  p = FindNumericsProfile("hf").value();
  p.sliding_attention = lockstep::AttentionProgram::kTiles512Forward;
  EXPECT_THAT(Refusal(p), HasSubstr("field sliding_attention"));
}

}  // namespace
}  // namespace lockstep::cuda

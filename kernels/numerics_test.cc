#include "kernels/numerics.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(Numerics, PresetsAreFoundByTheirNames) {
  ASSERT_EQ(NumericsProfiles().size(), 4u);
  for (const NumericsProfile& profile : NumericsProfiles()) {
    const auto found = FindNumericsProfile(profile.name);
    ASSERT_TRUE(found.ok());
    EXPECT_EQ(found->name, profile.name);
    EXPECT_FALSE(found->description.empty());
  }
}

TEST(Numerics, TheTwoBf16ProfilesDifferInTheirPrograms) {
  const NumericsProfile hf = FindNumericsProfile("hf").value();
  const NumericsProfile torch = FindNumericsProfile("hf-torch").value();
  EXPECT_EQ(hf.gdn, GdnProgram::kChunkBf16);
  EXPECT_EQ(torch.gdn, GdnProgram::kChunkFp32);
  EXPECT_EQ(hf.attention, AttentionProgram::kTiles128Forward);
  EXPECT_EQ(torch.attention, AttentionProgram::kTiles512Forward);
  EXPECT_EQ(hf.attention_exp, AttentionExp::kExact);
  EXPECT_EQ(torch.attention_exp, AttentionExp::kTorchCpu);
  EXPECT_EQ(hf.linear, LinearProgram::kAscending);
  EXPECT_EQ(torch.linear, LinearProgram::kTorchCpuPairs);
  EXPECT_EQ(hf.square_sum, SquareSum::kLanes16);
  EXPECT_EQ(torch.square_sum, SquareSum::kTorchCpu);
  for (const NumericsProfile& p : {hf, torch}) {
    EXPECT_EQ(p.weights, DType::kBF16);
    EXPECT_EQ(p.activations, DType::kBF16);
    EXPECT_EQ(p.kv, DType::kBF16);
    EXPECT_EQ(p.conv, ConvCasts::kTwo);
    EXPECT_EQ(p.gated_norm, GatedNormCasts::kThree);
    EXPECT_EQ(p.attention_p, DType::kBF16);
    EXPECT_EQ(p.logits, DType::kBF16);
  }
}

TEST(Numerics, Fp32RoundsNowhere) {
  const NumericsProfile p = FindNumericsProfile("fp32").value();
  for (const DType t : {p.weights, p.activations, p.kv, p.attention_p, p.logits}) EXPECT_EQ(t, DType::kF32);
  EXPECT_EQ(p.gdn, GdnProgram::kChunkFp32);
  EXPECT_EQ(p.linear, LinearProgram::kAscending);
}

TEST(Numerics, AnUnknownNameListsTheKnownOnes) {
  const auto status = FindNumericsProfile("fp16").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'fp16'"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("hf, hf-flash, hf-torch, fp32"));
}

TEST(Numerics, DTypeNames) {
  EXPECT_EQ(DTypeName(DType::kF32), "float32");
  EXPECT_EQ(DTypeName(DType::kBF16), "bfloat16");
  EXPECT_EQ(DTypeName(DType::kF16), "float16");
}

}  // namespace
}  // namespace lockstep

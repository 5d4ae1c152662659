#include "kernels/numerics.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(Numerics, PresetsAreFoundByTheirNames) {
  ASSERT_EQ(NumericsProfiles().size(), 8u);
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
    EXPECT_EQ(p.residual, DType::kBF16);
    EXPECT_EQ(p.embedding, DType::kBF16);
    EXPECT_EQ(p.norm_weights, DType::kBF16);
    EXPECT_EQ(p.a_log, DType::kF32);
    EXPECT_EQ(p.sliding_attention, p.attention);
  }
}

TEST(Numerics, AutocastKeepsTheResidualStreamInFp32) {
  const NumericsProfile p = FindNumericsProfile("hf-autocast").value();
  for (const DType t : {p.residual, p.embedding, p.norm_weights, p.a_log}) EXPECT_EQ(t, DType::kF32);
  for (const DType t : {p.weights, p.activations, p.kv, p.attention_p, p.logits}) EXPECT_EQ(t, DType::kBF16);
  EXPECT_EQ(p.gated_norm, GatedNormCasts::kTwo);
  EXPECT_EQ(p.conv, ConvCasts::kTwo);
  EXPECT_EQ(p.gdn, GdnProgram::kChunkBf16);
}

TEST(Numerics, MaskedDiffersFromHfInTheSlidingLayersOnly) {
  const NumericsProfile hf = FindNumericsProfile("hf").value();
  const NumericsProfile masked = FindNumericsProfile("hf-masked").value();
  EXPECT_EQ(masked.sliding_attention, AttentionProgram::kTiles128ForwardMask);
  EXPECT_EQ(masked.attention, hf.attention);
  EXPECT_EQ(masked.residual, hf.residual);
  EXPECT_EQ(masked.gated_norm, hf.gated_norm);
}

// Nothing is claimed of a trainer that nobody ran.
TEST(Numerics, OlmoCoreIsUnverified) {
  const NumericsProfile p = FindNumericsProfile("olmo-core").value();
  EXPECT_EQ(p.verified_against, "");
  EXPECT_THAT(std::string(p.description), HasSubstr("unverified"));
  EXPECT_EQ(p.a_log, DType::kBF16);
  EXPECT_EQ(p.conv, ConvCasts::kOne);
  EXPECT_EQ(p.gated_norm, GatedNormCasts::kOne);
}

TEST(Numerics, Fp32RoundsNowhere) {
  const NumericsProfile p = FindNumericsProfile("fp32").value();
  for (const DType t :
       {p.weights, p.embedding, p.norm_weights, p.a_log, p.activations, p.residual, p.kv, p.attention_p, p.logits}) {
    EXPECT_EQ(t, DType::kF32);
  }
  EXPECT_EQ(p.gdn, GdnProgram::kChunkFp32);
  EXPECT_EQ(p.linear, LinearProgram::kAscending);
}

TEST(Numerics, AnUnknownNameListsTheKnownOnes) {
  const auto status = FindNumericsProfile("fp16").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'fp16'"));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("hf, hf-masked, hf-flash, hf-autocast, hf-autocast-masked, hf-torch, olmo-core, fp32"));
}

TEST(Numerics, DTypeNames) {
  EXPECT_EQ(DTypeName(DType::kF32), "float32");
  EXPECT_EQ(DTypeName(DType::kBF16), "bfloat16");
  EXPECT_EQ(DTypeName(DType::kF16), "float16");
}

}  // namespace
}  // namespace lockstep

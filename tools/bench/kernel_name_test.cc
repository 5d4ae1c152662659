#include "tools/bench/kernel_name.h"

#include "gtest/gtest.h"

namespace lockstep {
namespace {

TEST(KernelName, LosesResultArgumentsNamespacesAndCasts) {
  EXPECT_EQ(ShortKernelName("void lockstep::cuda::(anonymous namespace)::DecodeKernel<lockstep::cuda::(anonymous "
                            "namespace)::Cudnn, (int)2>(lockstep::cuda::AttentionArgs)"),
            "DecodeKernel<Cudnn, 2>");
  EXPECT_EQ(ShortKernelName("void a::K<(bool)1, (bool)0, (a::Fusion)2, (int)-3>(a::P<(int)1>)"),
            "K<true, false, 2, -3>");
  EXPECT_EQ(ShortKernelName("a::Plain(int, float const*)"), "Plain");
}

TEST(KernelName, DemanglesAsTheCompilerMangles) {
  EXPECT_EQ(ShortKernelName("_ZN8lockstep4cuda16LinearTileKernelILi1ELi1ELi104EEEvNS0_16LinearKernelArgsE"),
            "LinearTileKernel<1, 1, 104>");
  EXPECT_EQ(ShortKernelName("_ZN8lockstep4cuda44_GLOBAL__N__d1714f94_11_rms_norm_cu_cafefebaL13RmsNormKernelILNS0_"
                            "13RmsNormFusionE0ENS1_5TypesIfffEELi1EEEvNS0_13RmsNormParamsE"),
            "RmsNormKernel<0, Types<float, float, float>, 1>");
}

TEST(KernelName, OneThatIsNotOfCppStaysAsItIs) {
  EXPECT_EQ(ShortKernelName("sm90_xmma_gemm_bf16"), "sm90_xmma_gemm_bf16");
}

TEST(KernelName, LongListsAreCutBetweenArguments) {
  EXPECT_EQ(ShortKernelName("void Kernel<Alpha, Beta<One, Two, Three>, GammaGamma, Delta, Epsilon>(int)"),
            "Kernel<Alpha, Beta<One, Two, Three>, ...>");
  EXPECT_EQ(ShortKernelName("void Kernel<AVeryLongTypeNameThatFillsTheWholeColumnByItself>(int)"), "Kernel<...>");
}

TEST(KernelName, BaseName) {
  EXPECT_EQ(KernelBaseName("DecodeKernel<Cudnn, 2>"), "DecodeKernel");
  EXPECT_EQ(KernelBaseName("Plain"), "Plain");
}

}  // namespace
}  // namespace lockstep

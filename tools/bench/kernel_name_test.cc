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

TEST(KernelName, LastArgument) {
  EXPECT_EQ(KernelLastArgument("DecodeKernel<Cudnn, 2>"), "2");
  EXPECT_EQ(KernelLastArgument("Kernel<One>"), "One");
  EXPECT_EQ(KernelLastArgument("Kernel<One, Pair<One, List<Two> > >"), "Pair<One, List<Two> >");
  EXPECT_EQ(KernelLastArgument("Kernel<Alpha, ...>"), "...");
  EXPECT_EQ(KernelLastArgument("Plain"), "");
  // By which attention's two kernels are told apart: the longest of their names is not cut.
  const std::string mangled = "_ZN8lockstep4cuda52_GLOBAL__N__1209b580_19_attention_decode_cu_522a415a12DecodeKernel";
  EXPECT_EQ(
      KernelLastArgument(ShortKernelName(mangled + "INS0_9TileOrderILb1ELi128ELb0EEELb1EEEvNS0_13AttentionArgsE")),
      "true");
  EXPECT_EQ(
      KernelLastArgument(ShortKernelName(mangled + "INS0_9TileOrderILb1ELi128ELb0EEELb0EEEvNS0_13AttentionArgsE")),
      "false");
}

TEST(KernelName, BaseName) {
  EXPECT_EQ(KernelBaseName("DecodeKernel<Cudnn, 2>"), "DecodeKernel");
  EXPECT_EQ(KernelBaseName("Plain"), "Plain");
}

}  // namespace
}  // namespace lockstep

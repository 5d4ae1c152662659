#include "rollout/engine/cuda_model_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "tests/testing/random_model.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

// The specification of `kind` that CUDA has, with one thing changed.
std::string Refusal(ModelKind kind, const std::function<void(ModelSpec&)>& change) {
  ModelSpec spec = RandomCudaSpec(kind);
  change(spec);
  return std::string(CheckCudaModel(spec).message());
}

TEST(CudaModelCheck, TakesWhatKernelsAreCompiledFor) {
  for (const ModelKind kind : AllModelKinds()) {
    EXPECT_EQ(Refusal(kind, [](ModelSpec&) {}), "") << ModelKindName(kind);
  }
}

TEST(CudaModelCheck, NamesTheFieldTheValueAndWhatThereIs) {
  constexpr ModelKind kHybrid = ModelKind::kHybrid;  // a GDN layer, then one of attention
  const auto refusal = [&](const std::function<void(ModelSpec&)>& change) { return Refusal(kHybrid, change); };
  EXPECT_EQ(refusal([](ModelSpec& s) { s.layers[0].gdn.key_dim = 64; }),
            "config.json linear_key_head_dim: value 64 is not served by --backend cuda; want 96");
  EXPECT_THAT(refusal([](ModelSpec& s) { s.layers[0].gdn.key_dim = 128; }),
              HasSubstr("linear_key_head_dim: value 128"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.layers[0].gdn.value_dim = 128; }), HasSubstr("want 192"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.layers[0].gdn.conv_width = 3; }),
              HasSubstr("linear_conv_kernel_dim: value 3"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.layers[1].attention.head_dim = 256; }),
              HasSubstr("hidden_size / num_attention_heads: value 256"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.layers[1].attention.heads = 40; }),
              HasSubstr("num_attention_heads * 128: value 5120"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.hidden_size = 5120; }), HasSubstr("hidden_size: value 5120"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.hidden_size = 136; }), HasSubstr("want a multiple of 16"));
  EXPECT_THAT(refusal([](ModelSpec& s) { s.intermediate_size = 200; }), HasSubstr("intermediate_size: value 200"));
}

}  // namespace
}  // namespace lockstep

// The backend as callers make it: what it refuses, and that its methods reach their operations.
#include "kernels/cpu/cpu_ops.h"

#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::LogToStderr;
using testing::Matrix;

TEST(CpuOps, IsMadeForEveryPreset) {
  ThreadPool pool(2);
  for (const NumericsProfile& profile : NumericsProfiles()) {
    const auto ops = MakeCpuOps(profile, &pool);
    EXPECT_EQ(ops->profile().name, profile.name);
    EXPECT_EQ(&ops->threads(), &pool);
  }
}

TEST(CpuOps, AnMlpThroughTheInterface) {
  ThreadPool pool(2);
  const auto ops = MakeCpuOps(FindNumericsProfile("hf").value(), &pool);
  // gate = x, up = 2 x: out = round(round(silu(x)) * 2 x), after a norm whose input is a token's embedding.
  const int64_t hidden = 40;
  std::vector<float> stacked(2 * hidden * hidden, 0.0f);
  for (int64_t i = 0; i < hidden; ++i) {
    stacked[i * hidden + i] = 1.0f;
    stacked[(hidden + i) * hidden + i] = 2.0f;
  }
  Matrix table(3, hidden, 0);
  table.Fill(1, true);
  const HostMatrix parts[] = {{stacked.data(), hidden, hidden, DType::kF32},
                              {stacked.data() + hidden * hidden, hidden, hidden, DType::kF32}};
  const auto weight = *ops->PackLinear(parts);
  const auto embedding = *ops->PackEmbedding({table.row(0), 3, hidden, DType::kF32});
  const auto ones = *ops->PackVector(std::vector<float>(hidden, 1.0f), /*exact=*/false);
  const std::vector<int32_t> tokens = {2, 0};
  Matrix x(2, hidden);
  Matrix norm(2, hidden);
  Matrix gate_up(2, 2 * hidden);
  Matrix logits(2, 2 * hidden);
  Matrix out(2, hidden);
  ops->BeginStep({.tokens = tokens});
  ops->Embed(*embedding, x.view());
  ops->RmsNorm(x.view(), *ones, 1e-6f, norm.view());
  ops->Linear(norm.view(), *weight, gate_up.view());
  ops->Logits(norm.view(), *weight, logits.view());
  ops->SwiGlu(gate_up.view(), out.view());
  Matrix room(2, 2 * hidden);
  Matrix in_one(2, hidden);
  ops->LinearSwiGlu(norm.view(), *weight, room.view(), in_one.view());
  Matrix residual = x;
  ops->Add(out.view(), residual.view());
  Matrix post = x;
  ops->RmsNormAdd(out.view(), *ones, 1e-6f, post.view());
  Matrix fused = x;
  Matrix fused_norm(2, hidden);
  ops->AddRmsNorm(out.view(), fused.view(), *ones, 1e-6f, fused_norm.view());
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t i = 0; i < hidden; ++i) {
      EXPECT_EQ(x.at(r, i), table.at(tokens[r], i));
      EXPECT_EQ(gate_up.at(r, i), norm.at(r, i));
      EXPECT_EQ(gate_up.at(r, hidden + i), 2 * norm.at(r, i));
      EXPECT_EQ(logits.at(r, i), norm.at(r, i));
      const double gate = norm.at(r, i);
      EXPECT_NEAR(out.at(r, i), gate / (1 + std::exp(-gate)) * 2 * gate, 0.01 * std::abs(gate * gate));
      EXPECT_EQ(in_one.at(r, i), out.at(r, i));
      EXPECT_EQ(residual.at(r, i), RoundBf16(x.at(r, i) + out.at(r, i)));
      EXPECT_EQ(fused.at(r, i), residual.at(r, i));
      EXPECT_NE(post.at(r, i), residual.at(r, i));
      EXPECT_FALSE(std::isnan(fused_norm.at(r, i)));
    }
  }
}

TEST(CpuOpsDeathTest, ACpuWithoutFusedMultiplyAddIsRefused) {
  LogToStderr();
  ThreadPool pool(1);
  const NumericsProfile profile = FindNumericsProfile("hf").value();
  EXPECT_DEATH(
      {
        // As on a CPU that has none of the instruction sets compiled in.
        hwy::SetSupportedTargetsForTest(HWY_EMU128);
        MakeCpuOps(profile, &pool);
      },
      "the CPU backend needs a CPU with");
}

TEST(CpuOpsDeathTest, Float16ProfilesAreRefused) {
  LogToStderr();
  ThreadPool pool(1);
  NumericsProfile profile = FindNumericsProfile("hf").value();
  profile.kv = DType::kF16;
  EXPECT_DEATH(MakeCpuOps(profile, &pool), "not float16");
}

}  // namespace
}  // namespace lockstep

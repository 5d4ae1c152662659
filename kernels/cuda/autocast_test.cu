// The row-wise operations on an fp32 residual stream with fp32 norm weights, as under autocast, against oracles on the
// CPU. Device tests skip without a GPU. Bits against the trainer's own operations: tests/gpu/check_elementwise.py.
#include <cmath>
#include <vector>

#include "kernels/cuda/add.h"
#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/round_rows.h"

namespace lockstep::cuda {
namespace {

using Floats = std::vector<float>;

constexpr float kEps = 1e-6f;
constexpr int64_t kWidths[] = {128, 192, 1032, 1024, 2048, 3840, 4096};

Bits Rounded(const Floats& values) {
  Bits bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) bits[i] = F32ToBf16(values[i]);
  return bits;
}

Floats Widened(const Bits& bits) {
  Floats values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = Bf16ToF32(bits[i]);
  return values;
}

// residual + x, as a separate PyTorch addition of fp32 and bf16 gives it.
Floats Sum(const Floats& residual, const Bits& x) {
  Floats sum(x.size());
  for (size_t i = 0; i < x.size(); ++i) sum[i] = residual[i] + Bf16ToF32(x[i]);
  return sum;
}

// x: Bits or Floats.
template <class X>
Bits Norm(const std::vector<X>& x, const Floats& weight) {
  const auto width = static_cast<int64_t>(weight.size());
  const DeviceArray<X> device_x(x);
  const DeviceArray<float> device_weight(weight);
  const DeviceArray<uint16_t> out = Poisoned(x.size());
  const RmsNormParams params = {.x = device_x.data(),
                                .weight = device_weight.data(),
                                .out = out.bf16(),
                                .rows = static_cast<int64_t>(x.size()) / width,
                                .width = width,
                                .x_stride = width,
                                .out_stride = width,
                                .eps = kEps,
                                .x_dtype = sizeof(X) == 4 ? DType::kF32 : DType::kBF16,
                                .weight_dtype = DType::kF32};
  EXPECT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  return out.Host();
}

TEST_F(CudaOps, NormOfFp32RowsNearTheOracle) {
  for (const int64_t width : kWidths) {
    SCOPED_TRACE(width);
    const Floats x = RandomFloats(19 * width, 1, 0.1f, 30.0f);
    const Floats weight = RandomFloats(width, 2, 1.0f, 0.2f);
    const Bits got = Norm(x, weight);
    size_t outside = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t begin = i / width * width;
      double squares = 0.0;
      for (int64_t k = 0; k < width; ++k) squares += static_cast<double>(x[begin + k]) * x[begin + k];
      const double want = x[i] * weight[i - begin] / std::sqrt(squares / static_cast<double>(width) + kEps);
      // One rounding to bf16; in fp32 a sum whose every term goes through width / 128 + 9 additions, halved by the
      // root.
      outside += !(std::abs(Bf16ToF32(got[i]) - want) <= std::abs(want) * (0x1p-8 + 0x1p-18));
    }
    EXPECT_EQ(outside, 0u);
  }
}

// The sum's order is that of bf16 rows, whose bits PyTorch's recorded ones confirm: on values that both types hold,
// with weights that both hold, no bit may differ.
TEST_F(CudaOps, NormOfWidenedRowsHasTheBitsOfBf16Rows) {
  for (const int64_t width : kWidths) {
    SCOPED_TRACE(width);
    const Bits x = RandomBits(17 * width, 3, 2.0f);
    const Bits weight = RandomBits(width, 4);
    const DeviceArray<uint16_t> device_x(x);
    const DeviceArray<uint16_t> device_weight(weight);
    const DeviceArray<uint16_t> out = Poisoned(x.size());
    const RmsNormParams params = {.x = device_x.data(),
                                  .weight = device_weight.data(),
                                  .out = out.bf16(),
                                  .rows = 17,
                                  .width = width,
                                  .x_stride = width,
                                  .out_stride = width,
                                  .eps = kEps};
    ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
    const Bits want = out.Host();
    ExpectSameBits(Norm(x, Widened(weight)), want);
    ExpectSameBits(Norm(Widened(x), Widened(weight)), want);
  }
}

TEST_F(CudaOps, FusedAdditionsToAnFp32Residual) {
  for (const int64_t width : kWidths) {
    SCOPED_TRACE(width);
    constexpr int64_t kRows = 13;
    constexpr int64_t kOther = 8;  // columns of the residual that are another's
    const Bits x = RandomBits(kRows * width, 5);
    const Floats residual = RandomFloats(kRows * width, 6, 0.0f, 10.0f);
    const Floats weight = RandomFloats(width, 7, 1.0f, 0.2f);
    const auto spread = [&](const Floats& rows) {
      Floats wide = PoisonFloats(kRows * (width + kOther));
      for (int64_t r = 0; r < kRows; ++r)
        std::copy_n(rows.begin() + r * width, width, wide.begin() + r * (width + kOther));
      return wide;
    };
    const DeviceArray<uint16_t> device_x(x);
    const DeviceArray<float> device_weight(weight);
    const DeviceArray<float> before(spread(residual));
    const DeviceArray<float> after(spread(residual));
    const DeviceArray<float> plain(spread(residual));
    const DeviceArray<uint16_t> out = Poisoned(x.size());
    RmsNormParams params = {.fusion = RmsNormFusion::kAddBefore,
                            .x = device_x.data(),
                            .weight = device_weight.data(),
                            .residual = before.data(),
                            .out = out.bf16(),
                            .rows = kRows,
                            .width = width,
                            .x_stride = width,
                            .residual_stride = width + kOther,
                            .out_stride = width,
                            .eps = kEps,
                            .weight_dtype = DType::kF32,
                            .residual_dtype = DType::kF32};
    ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
    ExpectSameBits(before.Host(), spread(Sum(residual, x)));
    ExpectSameBits(out.Host(), Norm(Sum(residual, x), weight));

    params.fusion = RmsNormFusion::kAddAfter;
    params.residual = after.data();
    params.out = nullptr;
    params.out_stride = 0;
    ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
    ExpectSameBits(after.Host(), spread(Sum(residual, Norm(x, weight))));

    const AddParams add = {.x = device_x.bf16(),
                           .residual = plain.data(),
                           .rows = kRows,
                           .width = width,
                           .x_stride = width,
                           .residual_stride = width + kOther,
                           .residual_dtype = DType::kF32};
    ASSERT_TRUE(LaunchAdd(add, nullptr).ok());
    ExpectSameBits(plain.Host(), spread(Sum(residual, x)));
  }
}

TEST_F(CudaOps, RoundRowsRoundsToNearestEven) {
  constexpr int64_t kWidth = 136;
  constexpr int64_t kStride = kWidth + 8;
  Floats x = RandomFloats(kWidth * 7, 8, 0.0f, 1e3f);
  const uint32_t ties[] = {0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001,
                           0x3F807FFF, 0x7F7FFFFF, 0x80000000, 0x00000001};
  for (size_t i = 0; i < std::size(ties); ++i) x[i] = std::bit_cast<float>(ties[i]);
  Bits want(kStride * 7, kPoison);
  const Bits rounded = Rounded(x);
  for (int64_t r = 0; r < 7; ++r) std::copy_n(rounded.begin() + r * kWidth, kWidth, want.begin() + r * kStride);
  const DeviceArray<float> device_x(x);
  const DeviceArray<uint16_t> out = Poisoned(want.size());
  const RoundRowsParams params = {
      .x = device_x.data(), .out = out.bf16(), .rows = 7, .width = kWidth, .x_stride = kWidth, .out_stride = kStride};
  ASSERT_TRUE(LaunchRoundRows(params, nullptr).ok());
  ExpectSameBits(out.Host(), want);
}

TEST_F(CudaOps, Fp32EmbeddingOfEitherTable) {
  constexpr int64_t kVocab = 101;
  constexpr int64_t kHidden = 1032;
  constexpr int64_t kStride = kHidden + 8;
  const Floats table = RandomFloats(kVocab * kHidden, 9);
  const Bits half = Rounded(table);
  const Floats widened = Widened(half);
  const std::vector<int32_t> tokens = {0, 100, 7, 7, 50};
  const DeviceArray<float> device_table(table);
  const DeviceArray<uint16_t> device_half(half);
  const DeviceArray<int32_t> device_tokens(tokens);
  for (const bool fp32 : {true, false}) {
    Floats want = PoisonFloats(tokens.size() * kStride);
    for (size_t r = 0; r < tokens.size(); ++r) {
      std::copy_n((fp32 ? table : widened).begin() + tokens[r] * kHidden, kHidden,
                  want.begin() + static_cast<int64_t>(r) * kStride);
    }
    const DeviceArray<float> out(PoisonFloats(want.size()));
    const EmbeddingParams params = {.tokens = device_tokens.data(),
                                    .table = fp32 ? static_cast<const void*>(device_table.data()) : device_half.data(),
                                    .out = out.data(),
                                    .rows = static_cast<int64_t>(tokens.size()),
                                    .vocab = kVocab,
                                    .hidden = kHidden,
                                    .out_stride = kStride,
                                    .table_dtype = fp32 ? DType::kF32 : DType::kBF16,
                                    .out_dtype = DType::kF32};
    ASSERT_TRUE(LaunchEmbedding(params, nullptr).ok());
    ExpectSameBits(out.Host(), want);
  }
}

TEST_F(CudaOps, GatherFp32RowsCopies) {
  constexpr int64_t kWidth = 1032;
  const Floats in = RandomFloats(10 * kWidth, 10);
  const std::vector<int32_t> indices = {9, 0, 4, 4};
  Floats want;
  for (const int32_t i : indices) want.insert(want.end(), in.begin() + i * kWidth, in.begin() + (i + 1) * kWidth);
  const DeviceArray<float> device_in(in);
  const DeviceArray<int32_t> device_indices(indices);
  const DeviceArray<float> out(PoisonFloats(want.size()));
  const GatherRowsParams params = {.indices = device_indices.data(),
                                   .in = device_in.data(),
                                   .out = out.data(),
                                   .rows = static_cast<int64_t>(indices.size()),
                                   .in_rows = 10,
                                   .width = kWidth,
                                   .in_stride = kWidth,
                                   .out_stride = kWidth,
                                   .dtype = DType::kF32};
  ASSERT_TRUE(LaunchGatherRows(params, nullptr).ok());
  ExpectSameBits(out.Host(), want);
}

Bits GatedNorm(const Bits& x, const Bits& gate, const void* weight, int64_t head_dim, GatedNormCasts casts) {
  const int64_t width = 3 * head_dim;
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_gate(gate);
  const DeviceArray<uint16_t> out = Poisoned(x.size());
  const GatedRmsNormParams params = {.x = device_x.bf16(),
                                     .gate = device_gate.bf16(),
                                     .weight = weight,
                                     .out = out.bf16(),
                                     .rows = static_cast<int64_t>(x.size()) / width,
                                     .heads = 3,
                                     .head_dim = head_dim,
                                     .x_stride = width,
                                     .gate_stride = width,
                                     .out_stride = width,
                                     .eps = 1e-5f,
                                     .casts = casts};
  EXPECT_TRUE(LaunchGatedRmsNorm(params, nullptr).ok());
  return out.Host();
}

// Of a weight of 1 the second rounding has nothing to do: two and three roundings are the same then.
TEST_F(CudaOps, GatedNormWithAnFp32WeightHasTwoRoundings) {
  for (const int64_t head_dim : {128, 192, 256}) {
    SCOPED_TRACE(head_dim);
    const Bits x = RandomBits(21 * 3 * head_dim, 11, 2.0f);
    const Bits gate = RandomBits(x.size(), 12, 3.0f);
    const DeviceArray<uint16_t> bf16_ones(Bits(head_dim, F32ToBf16(1.0f)));
    const DeviceArray<float> fp32_ones(Floats(head_dim, 1.0f));
    const Bits same = GatedNorm(x, gate, bf16_ones.data(), head_dim, GatedNormCasts::kThree);
    ExpectSameBits(GatedNorm(x, gate, fp32_ones.data(), head_dim, GatedNormCasts::kTwo), same);

    const Floats weight = RandomFloats(head_dim, 13, 1.0f, 0.3f);
    const DeviceArray<float> device_weight(weight);
    const Bits got = GatedNorm(x, gate, device_weight.data(), head_dim, GatedNormCasts::kTwo);
    size_t outside = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t begin = i / head_dim * head_dim;
      double squares = 0.0;
      for (int64_t k = 0; k < head_dim; ++k) squares += std::pow(static_cast<double>(Bf16ToF32(x[begin + k])), 2);
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(head_dim) + 1e-5);
      const double z = Bf16ToF32(gate[i]);
      const double want = Bf16ToF32(x[i]) * inverse * weight[i - begin] * z / (1.0 + std::exp(-z));
      outside += !(std::abs(Bf16ToF32(got[i]) - want) <= std::abs(want) * (2.1 * 0x1p-8 + 0x1p-16));
    }
    EXPECT_EQ(outside, 0u);
  }
}

// From here on no GPU is needed.
TEST(CudaParams, RmsNormRefusesDtypesWithoutAKernel) {
  using P = RmsNormParams;
  const P good = {.x = Address(),
                  .weight = Address(),
                  .out = Address(8192),
                  .rows = 3,
                  .width = 192,
                  .x_stride = 192,
                  .out_stride = 192,
                  .eps = kEps,
                  .x_dtype = DType::kF32,
                  .weight_dtype = DType::kF32};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".x_dtype", [](P& p) { p.weight_dtype = DType::kBF16; });
  ExpectRefusedAfter(good, ".x_dtype", [](P& p) { p.x_dtype = DType::kF16; });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = Address(); });
  P fused = good;
  fused.fusion = RmsNormFusion::kAddBefore;
  fused.x_dtype = DType::kBF16;
  fused.residual = Address(16384);
  fused.residual_stride = 192;
  fused.residual_dtype = DType::kF32;
  ASSERT_TRUE(fused.Validate().ok());
  ExpectRefusedAfter(fused, ".x_dtype", [](P& p) { p.x_dtype = DType::kF32; });
  ExpectRefusedAfter(fused, ".residual_dtype", [](P& p) { p.residual_dtype = DType::kBF16; });
  ExpectRefusedAfter(fused, ".weight_dtype", [](P& p) {
    p.fusion = RmsNormFusion::kAddAfterNorm;
    p.out_weight = Address();
  });
  EXPECT_EQ(LaunchRmsNormPair(good, good, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaParams, RowOperationsRefuseOtherDtypes) {
  static int32_t word = 0;
  const EmbeddingParams embedding = {.tokens = &word,
                                     .table = Address(),
                                     .out = Address(),
                                     .rows = 1,
                                     .vocab = 4,
                                     .hidden = 64,
                                     .out_stride = 64,
                                     .out_dtype = DType::kF32};
  ASSERT_TRUE(embedding.Validate().ok());
  ExpectRefusedAfter(embedding, ".out_dtype", [](EmbeddingParams& p) { p.out_dtype = DType::kF16; });
  ExpectRefusedAfter(embedding, ".table_dtype", [](EmbeddingParams& p) {
    p.table_dtype = DType::kF32;
    p.out_dtype = DType::kBF16;
  });
  const AddParams add = {
      .x = Address(), .residual = Address(), .rows = 2, .width = 64, .x_stride = 64, .residual_stride = 64};
  ExpectRefusedAfter(add, ".residual_dtype", [](AddParams& p) { p.residual_dtype = DType::kF16; });
  const RoundRowsParams round = {.x = reinterpret_cast<const float*>(Address()),
                                 .out = Address(),
                                 .rows = 2,
                                 .width = 64,
                                 .x_stride = 64,
                                 .out_stride = 64};
  ASSERT_TRUE(round.Validate().ok());
  ExpectRefusedAfter(round, ".rows", [](RoundRowsParams& p) { p.rows = -1; });
  ExpectRefusedAfter(round, ".width", [](RoundRowsParams& p) { p.width = 60; });
  ExpectRefusedAfter(round, ".x:", [](RoundRowsParams& p) { p.x = nullptr; });
  ExpectRefusedAfter(round, ".out:", [](RoundRowsParams& p) { p.out = Address(4100); });
  ExpectRefusedAfter(round, ".x_stride", [](RoundRowsParams& p) { p.x_stride = 56; });
  ExpectRefusedAfter(round, ".out_stride", [](RoundRowsParams& p) { p.out_stride = 65; });
}

}  // namespace
}  // namespace lockstep::cuda

// The first CUDA operations against PyTorch's own bits (tests/data/torch_ops) and an fp64 oracle. Validate()'s tests
// need no GPU; the others skip without one.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/swiglu.h"

namespace lockstep::cuda {
namespace {

constexpr float kEps = 1e-6f;

Bits Norm(const Bits& x, const Bits& weight) {
  const auto width = static_cast<int64_t>(weight.size());
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_weight(weight);
  const DeviceArray<uint16_t> out = Poisoned(x.size());
  const RmsNormParams params = {.x = device_x.bf16(),
                                .weight = device_weight.bf16(),
                                .out = out.bf16(),
                                .rows = static_cast<int64_t>(x.size()) / width,
                                .width = width,
                                .x_stride = width,
                                .out_stride = width,
                                .eps = kEps};
  EXPECT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  return out.Host();
}

// round(a + b), as a separate PyTorch addition gives it.
Bits Sum(const Bits& a, const Bits& b) {
  Bits sum(a.size());
  for (size_t i = 0; i < a.size(); ++i) sum[i] = F32ToBf16(Bf16ToF32(a[i]) + Bf16ToF32(b[i]));
  return sum;
}

TEST_F(CudaOps, RmsNormHasPyTorchsBits) {
  for (const std::string name : {"rms192", "rms3840"}) {
    SCOPED_TRACE(name);
    ExpectSameBits(Norm(ReadArray<uint16_t>(name + "_x.bf16"), ReadArray<uint16_t>(name + "_w.bf16")),
                   ReadArray<uint16_t>(name + "_y.bf16"));
  }
}

// One rounding to bf16 is 2^-8 of the value at most (half a step at the foot of a binade). Before it, in units of
// 2^-24: a sum's chain of width / 32 + 7 additions and the square, halved by the root; rsqrt's 2 ulp; two products.
TEST_F(CudaOps, RmsNormNearTheOracle) {
  for (const int64_t width : {128, 192, 256, 3840, 4096}) {
    SCOPED_TRACE(width);
    const Bits x = RandomBits(37 * width, 1, 3.0f);
    const Bits weight = RandomBits(width, 2);
    const Bits out = Norm(x, weight);
    const double fp32_error = (static_cast<double>(width) / 32 + 16) * 0x1p-24;
    size_t outside = 0;
    for (size_t begin = 0; begin < x.size(); begin += width) {
      double squares = 0.0;
      for (int64_t i = 0; i < width; ++i) squares += std::pow(static_cast<double>(Bf16ToF32(x[begin + i])), 2);
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + kEps);
      for (int64_t i = 0; i < width; ++i) {
        const double want = static_cast<double>(Bf16ToF32(x[begin + i])) * inverse * Bf16ToF32(weight[i]);
        const double error = std::abs(Bf16ToF32(out[begin + i]) - want);
        outside += !(error <= std::abs(want) * (0x1p-8 + fp32_error));  // a NaN counts
      }
    }
    EXPECT_EQ(outside, 0u);
  }
}

TEST_F(CudaOps, RmsNormRowDoesNotDependOnItsNeighbours) {
  for (const int64_t width : {192, 3840}) {
    SCOPED_TRACE(width);
    const Bits x = RandomBits(300 * width, 3);
    const Bits weight = RandomBits(width, 4);
    const Bits together = Norm(x, weight);
    for (const int64_t row : {0, 1, 149, 298, 299}) {
      const Bits alone = Norm(Bits(x.begin() + row * width, x.begin() + (row + 1) * width), weight);
      ExpectSameBits(alone, Bits(together.begin() + row * width, together.begin() + (row + 1) * width));
    }
  }
}

// In place, in the first columns of wider rows: the rest stays as it was.
TEST_F(CudaOps, RmsNormInPlaceWithStride) {
  constexpr int64_t kRows = 9;
  constexpr int64_t kWidth = 256;
  constexpr int64_t kStride = 264;
  const Bits x = RandomBits(kRows * kWidth, 5);
  const Bits weight = RandomBits(kWidth, 6);
  const Bits norm = Norm(x, weight);
  Bits wide(kRows * kStride, kPoison);
  Bits want = wide;
  for (int64_t r = 0; r < kRows; ++r) {
    std::copy_n(x.begin() + r * kWidth, kWidth, wide.begin() + r * kStride);
    std::copy_n(norm.begin() + r * kWidth, kWidth, want.begin() + r * kStride);
  }
  const DeviceArray<uint16_t> rows(wide);
  const DeviceArray<uint16_t> device_weight(weight);
  const RmsNormParams params = {.x = rows.bf16(),
                                .weight = device_weight.bf16(),
                                .out = rows.bf16(),
                                .rows = kRows,
                                .width = kWidth,
                                .x_stride = kStride,
                                .out_stride = kStride,
                                .eps = kEps};
  ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  ExpectSameBits(rows.Host(), want);
}

// The fused forms are the single operations, bit for bit.
TEST_F(CudaOps, FusedAdditionsEqualTheSingleOperations) {
  constexpr int64_t kRows = 21;
  constexpr int64_t kWidth = 3840;
  const Bits x = RandomBits(kRows * kWidth, 7);
  const Bits residual = RandomBits(kRows * kWidth, 8);
  const Bits weight = RandomBits(kWidth, 9);
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_weight(weight);
  const DeviceArray<uint16_t> before(residual);
  const DeviceArray<uint16_t> after(residual);
  const DeviceArray<uint16_t> out = Poisoned(x.size());
  RmsNormParams params = {.fusion = RmsNormFusion::kAddBefore,
                          .x = device_x.bf16(),
                          .weight = device_weight.bf16(),
                          .residual = before.bf16(),
                          .out = out.bf16(),
                          .rows = kRows,
                          .width = kWidth,
                          .x_stride = kWidth,
                          .residual_stride = kWidth,
                          .out_stride = kWidth,
                          .eps = kEps};
  ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  ExpectSameBits(before.Host(), Sum(residual, x));
  ExpectSameBits(out.Host(), Norm(Sum(residual, x), weight));

  params.fusion = RmsNormFusion::kAddAfter;
  params.residual = after.bf16();
  params.out = nullptr;
  params.out_stride = 0;
  ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  ExpectSameBits(after.Host(), Sum(residual, Norm(x, weight)));
}

TEST_F(CudaOps, NormAddNormEqualsTheSingleOperations) {
  for (const int64_t width : {256, 1024, 3840, 4096}) {
    SCOPED_TRACE(width);
    constexpr int64_t kRows = 11;
    const Bits x = RandomBits(kRows * width, 20);
    const Bits residual = RandomBits(kRows * width, 21);
    const Bits weight = RandomBits(width, 22);
    const Bits out_weight = RandomBits(width, 23);
    const DeviceArray<uint16_t> device_x(x);
    const DeviceArray<uint16_t> device_residual(residual);
    const DeviceArray<uint16_t> device_weight(weight);
    const DeviceArray<uint16_t> device_out_weight(out_weight);
    const DeviceArray<uint16_t> out = Poisoned(x.size());
    const RmsNormParams params = {.fusion = RmsNormFusion::kAddAfterNorm,
                                  .x = device_x.bf16(),
                                  .weight = device_weight.bf16(),
                                  .out_weight = device_out_weight.bf16(),
                                  .residual = device_residual.bf16(),
                                  .out = out.bf16(),
                                  .rows = kRows,
                                  .width = width,
                                  .x_stride = width,
                                  .residual_stride = width,
                                  .out_stride = width,
                                  .eps = kEps};
    ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
    const Bits sum = Sum(residual, Norm(x, weight));
    ExpectSameBits(device_residual.Host(), sum);
    ExpectSameBits(out.Host(), Norm(sum, out_weight));
  }
}

TEST_F(CudaOps, RmsNormOfGatheredRows) {
  constexpr int64_t kWidth = 256;
  const Bits x = RandomBits(9 * kWidth, 24);
  const Bits weight = RandomBits(kWidth, 25);
  const Bits norm = Norm(x, weight);
  const std::vector<int32_t> rows = {8, 0, 3, 3};
  Bits want;
  for (const int32_t row : rows)
    want.insert(want.end(), norm.begin() + row * kWidth, norm.begin() + (row + 1) * kWidth);
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_weight(weight);
  const DeviceArray<int32_t> device_rows(rows);
  const DeviceArray<uint16_t> out = Poisoned(want.size());
  const RmsNormParams params = {.x = device_x.bf16(),
                                .weight = device_weight.bf16(),
                                .x_rows = device_rows.data(),
                                .out = out.bf16(),
                                .rows = static_cast<int64_t>(rows.size()),
                                .width = kWidth,
                                .x_stride = kWidth,
                                .out_stride = kWidth,
                                .eps = kEps};
  ASSERT_TRUE(LaunchRmsNorm(params, nullptr).ok());
  ExpectSameBits(out.Host(), want);
}

// Two column ranges of the same rows, of different widths, in place.
TEST_F(CudaOps, RmsNormPairEqualsTwoNorms) {
  constexpr int64_t kRows = 19;
  const int64_t widths[2] = {512, 128};
  constexpr int64_t kStride = 512 + 128 + 8;
  const Bits x[2] = {RandomBits(kRows * widths[0], 26), RandomBits(kRows * widths[1], 27)};
  const Bits weight[2] = {RandomBits(widths[0], 28), RandomBits(widths[1], 29)};
  Bits wide(kRows * kStride, kPoison);
  Bits want = wide;
  for (int i = 0; i < 2; ++i) {
    const Bits norm = Norm(x[i], weight[i]);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t column = r * kStride + i * widths[0];
      std::copy_n(x[i].begin() + r * widths[i], widths[i], wide.begin() + column);
      std::copy_n(norm.begin() + r * widths[i], widths[i], want.begin() + column);
    }
  }
  const DeviceArray<uint16_t> rows(wide);
  const DeviceArray<uint16_t> device_weight[2] = {DeviceArray<uint16_t>(weight[0]), DeviceArray<uint16_t>(weight[1])};
  RmsNormParams params[2];
  for (int i = 0; i < 2; ++i) {
    params[i] = {.x = rows.bf16() + i * widths[0],
                 .weight = device_weight[i].bf16(),
                 .out = rows.bf16() + i * widths[0],
                 .rows = kRows,
                 .width = widths[i],
                 .x_stride = kStride,
                 .out_stride = kStride,
                 .eps = kEps};
  }
  ASSERT_TRUE(LaunchRmsNormPair(params[0], params[1], nullptr).ok());
  ExpectSameBits(rows.Host(), want);
}

Bits SwiGlu(const Bits& gate_up, int64_t rows, int64_t width) {
  const DeviceArray<uint16_t> in(gate_up);
  const DeviceArray<uint16_t> out = Poisoned(rows * width);
  const SwiGluParams params = {.gate_up = in.bf16(),
                               .out = out.bf16(),
                               .rows = rows,
                               .width = width,
                               .gate_up_stride = 2 * width,
                               .out_stride = width};
  EXPECT_TRUE(LaunchSwiGlu(params, nullptr).ok());
  return out.Host();
}

// Every bf16 gate, beside an up of 1 (silu's own bits) and beside random ups (its product, rounded once more).
TEST_F(CudaOps, SwiGluHasPyTorchsBits) {
  constexpr int64_t kRows = 64;
  constexpr int64_t kWidth = 1024;
  const Bits silu = ReadArray<uint16_t>("unary_silu.bf16");
  ASSERT_EQ(silu.size(), static_cast<size_t>(kRows * kWidth));
  const Bits ups[] = {Bits(silu.size(), F32ToBf16(1.0f)), RandomBits(silu.size(), 10)};
  for (const Bits& up : ups) {
    Bits gate_up(2 * silu.size());
    Bits want(silu.size());
    for (size_t i = 0; i < silu.size(); ++i) {
      const size_t column = i / kWidth * 2 * kWidth + i % kWidth;
      gate_up[column] = static_cast<uint16_t>(i);
      gate_up[column + kWidth] = up[i];
      const float product = Bf16ToF32(silu[i]) * Bf16ToF32(up[i]);
      want[i] = std::isnan(product) ? 0x7FFF : F32ToBf16(product);
    }
    ExpectSameBits(SwiGlu(gate_up, kRows, kWidth), want);
  }
}

TEST_F(CudaOps, EmbeddingCopiesRows) {
  constexpr int64_t kVocab = 101;
  for (const int64_t hidden : {8, 136, 3840}) {
    SCOPED_TRACE(hidden);
    Bits table(kVocab * hidden);
    std::iota(table.begin(), table.end(), uint16_t{1});
    const std::vector<int32_t> tokens = {0, 100, 7, 7, 50};
    const int64_t stride = hidden + 8;
    Bits want(tokens.size() * stride, kPoison);
    for (size_t r = 0; r < tokens.size(); ++r) {
      std::copy_n(table.begin() + tokens[r] * hidden, hidden, want.begin() + static_cast<int64_t>(r) * stride);
    }
    const DeviceArray<uint16_t> device_table(table);
    const DeviceArray<int32_t> device_tokens(tokens);
    const DeviceArray<uint16_t> out = Poisoned(want.size());
    const EmbeddingParams params = {.tokens = device_tokens.data(),
                                    .table = device_table.bf16(),
                                    .out = out.bf16(),
                                    .rows = static_cast<int64_t>(tokens.size()),
                                    .vocab = kVocab,
                                    .hidden = hidden,
                                    .out_stride = stride};
    ASSERT_TRUE(LaunchEmbedding(params, nullptr).ok());
    ExpectSameBits(out.Host(), want);
  }
}

// From here on no GPU is needed.
TEST(CudaParams, RmsNormNamesTheBadField) {
  using P = RmsNormParams;
  const P good = {.x = Address(),
                  .weight = Address(),
                  .out = Address(),
                  .rows = 3,
                  .width = 192,
                  .x_stride = 192,
                  .out_stride = 192,
                  .eps = kEps};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = -1; });
  ExpectRefusedAfter(good, ".width", [](P& p) { p.width = 190; });
  ExpectRefusedAfter(good, ".width", [](P& p) { p.width = 124; });
  ExpectRefusedAfter(good, ".width", [](P& p) { p.width = 4100; });
  ExpectRefusedAfter(good, ".eps", [](P& p) { p.eps = -1.0f; });
  ExpectRefusedAfter(good, ".eps", [](P& p) { p.eps = NAN; });
  ExpectRefusedAfter(good, ".x:", [](P& p) { p.x = nullptr; });
  ExpectRefusedAfter(good, ".x:", [](P& p) { p.x = Address(4098); });
  ExpectRefusedAfter(good, ".x_stride", [](P& p) { p.x_stride = 188; });
  ExpectRefusedAfter(good, ".x_stride", [](P& p) { p.x_stride = 194; });
  ExpectRefusedAfter(good, ".weight", [](P& p) { p.weight = nullptr; });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 0; });
  ExpectRefusedAfter(good, ".residual", [](P& p) { p.residual = Address(); });
  ExpectRefusedAfter(good, ".residual", [](P& p) { p.fusion = RmsNormFusion::kAddBefore; });
  ExpectRefusedAfter(good, ".out:", [](P& p) {
    p.fusion = RmsNormFusion::kAddAfter;
    p.residual = Address();
    p.residual_stride = 192;
  });
  ExpectRefusedAfter(good, ".out_weight", [](P& p) { p.out_weight = Address(); });
  ExpectRefusedAfter(good, ".out:", [](P& p) {
    static const int32_t row = 0;
    p.x_rows = &row;
    p.out = Address();
  });
  P other = good;
  other.rows = 2;
  EXPECT_EQ(LaunchRmsNormPair(good, other, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaParams, SwiGluNamesTheBadField) {
  using P = SwiGluParams;
  const P good = {
      .gate_up = Address(), .out = Address(), .rows = 3, .width = 64, .gate_up_stride = 128, .out_stride = 64};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = -1; });
  ExpectRefusedAfter(good, ".width", [](P& p) { p.width = 60; });
  ExpectRefusedAfter(good, ".gate_up:", [](P& p) { p.gate_up = Address(4104); });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefusedAfter(good, ".gate_up_stride", [](P& p) { p.gate_up_stride = 64; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 68; });
}

TEST(CudaParams, EmbeddingNamesTheBadField) {
  using P = EmbeddingParams;
  static const int32_t token = 0;
  const P good = {
      .tokens = &token, .table = Address(), .out = Address(), .rows = 1, .vocab = 9, .hidden = 64, .out_stride = 64};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = -1; });
  ExpectRefusedAfter(good, ".vocab", [](P& p) { p.vocab = 0; });
  ExpectRefusedAfter(good, ".hidden", [](P& p) { p.hidden = 60; });
  ExpectRefusedAfter(good, ".tokens", [](P& p) { p.tokens = nullptr; });
  ExpectRefusedAfter(good, ".table", [](P& p) { p.table = Address(4104); });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 56; });
}

}  // namespace
}  // namespace lockstep::cuda

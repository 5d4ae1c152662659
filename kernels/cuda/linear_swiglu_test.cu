// The linear layer that ends in SwiGLU against the linear layer and SwiGLU, bit for bit. The test of Validate() needs
// no GPU; the others skip without one.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/swiglu.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kMargin = 8;  // columns and rows around an output that must stay poisoned, rows of NaNs behind inputs

Bits WithNans(Bits bits, int64_t count) {
  bits.resize(bits.size() + count, kPoison);
  return bits;
}

// x [m, k] and gate's and up's rows [2n, k] on the device, with NaNs behind both.
class Problem {
 public:
  Problem(int64_t rows, int64_t width, int64_t inputs, const Bits& x, const Bits& weight)
      : m(rows), n(width), k(inputs), x_(WithNans(x, kMargin * k)), weight_(WithNans(weight, kMargin * k)) {
    EXPECT_EQ(static_cast<int64_t>(x.size()), m * k);
    EXPECT_EQ(static_cast<int64_t>(weight.size()), 2 * n * k);
  }
  // `scale`: of the weights.
  Problem(int64_t rows, int64_t width, int64_t inputs, uint32_t seed, float scale = 0.05f)
      : Problem(rows, width, inputs, RandomBits(rows * inputs, seed), RandomBits(2 * width * inputs, seed + 1, scale)) {
  }

  const int64_t m, n, k;

  LinearParams Params(int64_t rows, __nv_bfloat16* out, int64_t out_stride) const {
    return {.x = x_.bf16(),
            .weight = weight_.bf16(),
            .out = out,
            .fusion = LinearFusion::kSwiGlu,
            .m = rows,
            .n = n,
            .k = k,
            .x_stride = k,
            .out_stride = out_stride};
  }

  // [m, n] by the two kernels.
  Bits Unfused() const {
    const DeviceArray<uint16_t> gate_up = Poisoned(m * 2 * n);
    const DeviceArray<uint16_t> out = Poisoned(m * n);
    LinearParams linear = Params(m, gate_up.bf16(), 2 * n);
    linear.fusion = LinearFusion::kNone;
    linear.n = 2 * n;
    EXPECT_TRUE(LaunchLinear(linear, nullptr).ok());
    const SwiGluParams swiglu = {
        .gate_up = gate_up.bf16(), .out = out.bf16(), .rows = m, .width = n, .gate_up_stride = 2 * n, .out_stride = n};
    EXPECT_TRUE(LaunchSwiGlu(swiglu, nullptr).ok());
    return out.Host();
  }

  // [rows, n] by the one; what lies around the output must stay as it was.
  Bits Fused(int64_t rows, const LinearTile* tile = nullptr) const {
    const int64_t stride = n + kMargin;
    const DeviceArray<uint16_t> out = Poisoned((rows + kMargin) * stride);
    const LinearParams params = Params(rows, out.bf16(), stride);
    const absl::Status status = tile == nullptr ? LaunchLinear(params, nullptr) : LaunchLinear(params, *tile, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    const Bits all = out.Host();
    Bits inside;
    inside.reserve(rows * n);
    int64_t touched = 0;
    for (int64_t r = 0; r < rows + kMargin; ++r) {
      const auto row = all.begin() + r * stride;
      const int64_t width = r < rows ? n : 0;
      inside.insert(inside.end(), row, row + width);
      touched += stride - width - std::count(row + width, row + stride, kPoison);
    }
    EXPECT_EQ(touched, 0) << "elements outside of the output";
    return inside;
  }

 private:
  const DeviceArray<uint16_t> x_, weight_;
};

Bits FirstRows(const Bits& all, int64_t rows, int64_t n) {
  return {all.begin(), all.begin() + rows * n};
}

class CudaLinearSwiGlu : public CudaOps {};

void ExpectTheBitsOfTheTwoKernels(int64_t n, int64_t k) {
  const Problem problem(1000, n, k, 1, 1.0f / std::sqrt(static_cast<float>(k)));
  const Bits want = problem.Unfused();
  ASSERT_EQ(std::count(want.begin(), want.end(), kPoison), 0);
  for (const int64_t rows : {1, 2, 7, 16, 33, 64, 65, 128, 200, 256, 288, 1000}) {
    SCOPED_TRACE(::testing::Message() << rows << " rows, n " << n << ", k " << k);
    ExpectSameBits(problem.Fused(rows), FirstRows(want, rows, n));
  }
}

// Widths below, at and beyond a tile's; k within one box, of whole boxes and ending inside one.
TEST_F(CudaLinearSwiGlu, HasTheBitsOfTheTwoKernels) {
  for (const auto& [n, k] : {std::pair{8, 16},
                             {8, 272},
                             {24, 48},
                             {24, 768},
                             {88, 208},
                             {88, 3840},
                             {768, 256},
                             {1000, 784},
                             {1000, 1024}}) {
    ExpectTheBitsOfTheTwoKernels(n, k);
  }
}

TEST_F(CudaLinearSwiGlu, HasThemAtAModelsShape) {
  ExpectTheBitsOfTheTwoKernels(11008, 3840);
}

template <int... kWidths>
void AddTiles(std::integer_sequence<int, kWidths...>, int warpgroups, int blocks, std::vector<LinearTile>& tiles) {
  (tiles.push_back({.warpgroups = warpgroups, .blocks = blocks, .features = kWidths}), ...);
}

// Every compiled tile: over ragged rows and widths, also less than the tile's, with a k of whole boxes and others.
TEST_F(CudaLinearSwiGlu, TilesGiveTheSameBits) {
  std::vector<LinearTile> tiles;
  AddTiles(LinearSwiGluWidths1x1(), 1, 1, tiles);
  AddTiles(LinearSwiGluWidths2x1(), 2, 1, tiles);
  AddTiles(LinearSwiGluWidths2x2(), 2, 2, tiles);
  for (const auto& [n, k] : {std::pair{776, 768}, {776, 784}, {776, 80}, {40, 192}, {8, 144}}) {
    const Problem problem(600, n, k, 3);
    const Bits want = problem.Unfused();
    for (const LinearTile& tile : tiles) {
      for (const int64_t rows : {1, 9, 33, 130, 600}) {
        SCOPED_TRACE(::testing::Message() << tile.warpgroups << " x " << tile.blocks << " x " << tile.features << ", "
                                          << rows << " rows, n " << n << ", k " << k);
        ExpectSameBits(problem.Fused(rows, &tile), FirstRows(want, rows, n));
      }
    }
  }
}

// Row r's gate is r's bits times `slope`, its up is another value: all bf16 gates, infinities and NaNs too.
TEST_F(CudaLinearSwiGlu, EveryGate) {
  constexpr int64_t kRows = 65536, kWidth = 8, kInputs = 16;
  const Bits ups = RandomBits(kRows, 5);
  Bits x(kRows * kInputs, 0);
  for (int64_t r = 0; r < kRows; ++r) {
    x[r * kInputs] = static_cast<uint16_t>(r);
    x[r * kInputs + 1] = ups[r];
  }
  for (const float slope : {1.0f, 4.0f, -1.0f}) {  // 4: finite values overflow, and up stays finite beside infinity
    SCOPED_TRACE(slope);
    Bits weight(2 * kWidth * kInputs, 0);
    for (int64_t c = 0; c < kWidth; ++c) {
      weight[c * kInputs] = F32ToBf16(slope);
      weight[(kWidth + c) * kInputs + 1] = F32ToBf16(1.0f);
    }
    const Problem problem(kRows, kWidth, kInputs, x, weight);
    ExpectSameBits(problem.Fused(kRows), problem.Unfused());
  }
}

// Infinities and NaNs stay in their own rows, whatever else a tile reads.
TEST_F(CudaLinearSwiGlu, BadRowsDoNotSpread) {
  constexpr int64_t kRows = 40, kWidth = 128, kInputs = 512;
  Bits x = RandomBits(kRows * kInputs, 7);
  const Bits weight = RandomBits(2 * kWidth * kInputs, 8, 0.05f);
  const Bits good = Problem(kRows, kWidth, kInputs, x, weight).Fused(kRows);
  std::fill_n(x.begin() + 7 * kInputs, kInputs, uint16_t{0x7FC0});
  std::fill_n(x.begin() + 33 * kInputs, kInputs, uint16_t{0x7F80});
  const Problem problem(kRows, kWidth, kInputs, x, weight);
  const Bits bad = problem.Fused(kRows);
  ExpectSameBits(bad, problem.Unfused());
  for (int64_t r = 0; r < kRows; ++r) {
    if (r == 7 || r == 33) continue;
    SCOPED_TRACE(r);
    ExpectSameBits(Bits(bad.begin() + r * kWidth, bad.begin() + (r + 1) * kWidth),
                   Bits(good.begin() + r * kWidth, good.begin() + (r + 1) * kWidth));
  }
}

// Between two linear layers as in a model, all with early starts, recorded in a graph and replayed over poisoned
// memory: it must wait for its x, and the layer behind it for its out.
TEST_F(CudaLinearSwiGlu, BetweenEarlyStartsInAGraph) {
  constexpr int64_t kHidden = 768, kWidth = 2048;
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  for (const int64_t rows : {1, 33, 100}) {
    SCOPED_TRACE(rows);
    const int64_t stride = kHidden + 24;
    const DeviceArray<uint16_t> x(RandomBits(rows * kHidden, 9));
    const DeviceArray<uint16_t> in(RandomBits(kHidden * kHidden, 10, 0.05f));
    const DeviceArray<uint16_t> gate_up(RandomBits(2 * kWidth * kHidden, 11, 0.05f));
    const DeviceArray<uint16_t> down(RandomBits(kHidden * kWidth, 12, 0.05f));
    const DeviceArray<uint16_t> h = Poisoned(rows * stride), product = Poisoned(rows * 2 * kWidth);
    const DeviceArray<uint16_t> mixed = Poisoned(rows * kWidth), out = Poisoned(rows * kHidden);
    LinearParams first = {.x = x.bf16(),
                          .weight = in.bf16(),
                          .out = h.data(),
                          .m = rows,
                          .n = kHidden,
                          .k = kHidden,
                          .x_stride = kHidden,
                          .out_stride = stride};
    LinearParams unfused = {.x = h.bf16(),
                            .weight = gate_up.bf16(),
                            .out = product.data(),
                            .m = rows,
                            .n = 2 * kWidth,
                            .k = kHidden,
                            .x_stride = stride,
                            .out_stride = 2 * kWidth};
    const SwiGluParams swiglu = {.gate_up = product.bf16(),
                                 .out = mixed.bf16(),
                                 .rows = rows,
                                 .width = kWidth,
                                 .gate_up_stride = 2 * kWidth,
                                 .out_stride = kWidth};
    LinearParams last = {.x = mixed.bf16(),
                         .weight = down.bf16(),
                         .out = out.data(),
                         .m = rows,
                         .n = kHidden,
                         .k = kWidth,
                         .x_stride = kWidth,
                         .out_stride = kHidden};
    ASSERT_TRUE(LaunchLinear(first, stream).ok());
    ASSERT_TRUE(LaunchLinear(unfused, stream).ok());
    ASSERT_TRUE(LaunchSwiGlu(swiglu, stream).ok());
    ASSERT_TRUE(LaunchLinear(last, stream).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const Bits want_mixed = mixed.Host();
    const Bits want = out.Host();

    LinearParams fused = unfused;
    fused.fusion = LinearFusion::kSwiGlu;
    fused.out = mixed.data();
    fused.n = kWidth;
    fused.out_stride = kWidth;
    first.early_start = fused.early_start = last.early_start = true;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(h.data(), 0xFF, rows * stride * 2, stream), cudaSuccess);
    EXPECT_EQ(cudaMemsetAsync(mixed.data(), 0xFF, rows * kWidth * 2, stream), cudaSuccess);
    EXPECT_TRUE(LaunchLinear(first, stream).ok());
    EXPECT_TRUE(LaunchLinear(fused, stream).ok());
    EXPECT_TRUE(LaunchLinear(last, stream).ok());
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    cudaGraphExec_t instance = nullptr;
    ASSERT_EQ(cudaGraphInstantiate(&instance, graph, 0), cudaSuccess);
    for (int replay = 0; replay < 20; ++replay) {
      ASSERT_EQ(cudaGraphLaunch(instance, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      ExpectSameBits(mixed.Host(), want_mixed);
      ExpectSameBits(out.Host(), want);
    }
    EXPECT_EQ(cudaGraphExecDestroy(instance), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(CudaLinearSwiGlu, TilesOfThePlainLayerAreRefused) {
  const Problem problem(1, 168, 64, 13);
  const DeviceArray<uint16_t> out = Poisoned(168);
  const LinearTile tile = {.features = 168};
  EXPECT_EQ(LaunchLinear(problem.Params(1, out.bf16(), 168), tile, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaLinearSwiGluParams, NamesTheBadField) {
  using P = LinearParams;
  const P good = {.x = Address(),
                  .weight = Address(),
                  .out = Address(),
                  .fusion = LinearFusion::kSwiGlu,
                  .m = 3,
                  .n = 24,
                  .k = 48,
                  .x_stride = 48,
                  .out_stride = 24};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".out_dtype:", [](P& p) { p.out_dtype = LinearOutput::kFp32; });
  ExpectRefusedAfter(good, ".n:", [](P& p) { p.n = 20; });
  ExpectRefusedAfter(good, ".out_stride:", [](P& p) { p.out_stride = 16; });
}

}  // namespace
}  // namespace lockstep::cuda

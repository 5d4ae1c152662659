// The linear layer against an emulation of the tensor core's chain and an fp64 oracle. Validate()'s test needs no GPU;
// the others skip without one.
#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/linear.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMargin = 8;  // columns and rows around an output that must stay poisoned

int Exponent(float x) {
  return x == 0.0f ? -126 : std::max(-126, std::ilogb(x));
}

// One step of the tensor core: 16 products and the accumulator are aligned to the largest exponent, truncated to 25
// fractional bits, added, and rounded toward zero to fp32. In fp64 every step of this is exact.
float TensorCoreStep(float accumulator, const uint16_t* x, const uint16_t* weight) {
  int largest = Exponent(accumulator);
  for (int i = 0; i < 16; ++i) {
    largest = std::max(largest, Exponent(Bf16ToF32(x[i])) + Exponent(Bf16ToF32(weight[i])));
  }
  double sum = std::trunc(std::ldexp(static_cast<double>(accumulator), 25 - largest));
  for (int i = 0; i < 16; ++i) {
    const double product = static_cast<double>(Bf16ToF32(x[i])) * Bf16ToF32(weight[i]);
    sum += std::trunc(std::ldexp(product, 25 - largest));
  }
  if (sum == 0.0) return 0.0f;
  const double value = std::ldexp(sum, largest - 25);
  const int exponent = std::max(-126, std::ilogb(value));
  return static_cast<float>(std::ldexp(std::trunc(std::ldexp(value, 23 - exponent)), exponent - 23));
}

float Chain(const uint16_t* x, const uint16_t* weight, int64_t k) {
  float accumulator = 0.0f;
  for (int64_t i = 0; i < k; i += 16) accumulator = TensorCoreStep(accumulator, x + i, weight + i);
  return accumulator;
}

struct Problem {
  int64_t m, n, k;
  Bits x, weight;

  Problem(int64_t rows, int64_t features, int64_t width, uint32_t seed)
      : m(rows), n(features), k(width), x(RandomBits(m * k, seed)), weight(RandomBits(n * k, seed + 1, 0.02f)) {}
};

// Runs `rows` of a problem into an output with a margin, checks the margin and returns the output itself.
template <class Word>
std::vector<Word> RunLinear(const Problem& problem, int64_t rows, const LinearTile* tile = nullptr) {
  const DeviceArray<uint16_t> x(problem.x);
  const DeviceArray<uint16_t> weight(problem.weight);
  const int64_t stride = problem.n + kMargin;
  const auto poison = static_cast<Word>(~Word{0});
  const DeviceArray<Word> out(std::vector<Word>((rows + kMargin) * stride, poison));
  const LinearParams params = {.x = x.bf16(),
                               .weight = weight.bf16(),
                               .out = out.data(),
                               .out_dtype = sizeof(Word) == 4 ? LinearOutput::kFp32 : LinearOutput::kBf16,
                               .m = rows,
                               .n = problem.n,
                               .k = problem.k,
                               .x_stride = problem.k,
                               .out_stride = stride};
  const absl::Status status = tile == nullptr ? LaunchLinear(params, nullptr) : LaunchLinear(params, *tile, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  const std::vector<Word> all = out.Host();
  std::vector<Word> inside;
  size_t touched = 0;
  for (int64_t r = 0; r < rows + kMargin; ++r) {
    for (int64_t c = 0; c < stride; ++c) {
      const Word word = all[r * stride + c];
      if (r < rows && c < problem.n) {
        inside.push_back(word);
      } else {
        touched += word != poison;
      }
    }
  }
  EXPECT_EQ(touched, 0u) << "elements outside of the output";
  return inside;
}

template <class Word>
void ExpectSame(const std::vector<Word>& got, const std::vector<Word>& want) {
  ASSERT_EQ(got.size(), want.size());
  ASSERT_FALSE(want.empty());
  size_t differing = 0;
  size_t first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (got[i] == want[i]) continue;
    ++differing;
    first = i;
  }
  EXPECT_EQ(differing, 0u) << "of " << want.size() << "; the first at " << first << ": " << std::hex << got[first]
                           << ", want " << want[first];
}

template <class Word>
std::vector<Word> FirstRows(const std::vector<Word>& all, int64_t rows, int64_t n) {
  return {all.begin(), all.begin() + rows * n};
}

class CudaLinear : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

TEST_F(CudaLinear, IsTheTensorCoresChain) {
  for (const auto& [m, n, k] : {std::tuple{3, 64, 3840}, {70, 72, 768}, {5, 40, 272}, {200, 136, 16}, {1, 8, 11008}}) {
    SCOPED_TRACE(::testing::Message() << m << " x " << n << " x " << k);
    const Problem problem(m, n, k, 1);
    std::vector<uint32_t> want;
    Bits rounded;
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t c = 0; c < n; ++c) {
        const float value = Chain(&problem.x[r * k], &problem.weight[c * k], k);
        want.push_back(std::bit_cast<uint32_t>(value));
        rounded.push_back(F32ToBf16(value));
      }
    }
    ExpectSame(RunLinear<uint32_t>(problem, m), want);
    ExpectSame(RunLinear<uint16_t>(problem, m), rounded);
  }
}

// Of a step, truncation loses less than 2^-24 of the largest term for each of 17 terms and the rounding less than 2^-23
// of the sum; terms and sums are at most the sum of the products' magnitudes.
TEST_F(CudaLinear, NearTheOracle) {
  const Problem problem(65, 256, 4096, 3);
  const std::vector<uint32_t> got = RunLinear<uint32_t>(problem, problem.m);
  size_t outside = 0;
  for (int64_t r = 0; r < problem.m; ++r) {
    for (int64_t c = 0; c < problem.n; ++c) {
      double sum = 0.0;
      double magnitude = 0.0;
      for (int64_t i = 0; i < problem.k; ++i) {
        const double product =
            static_cast<double>(Bf16ToF32(problem.x[r * problem.k + i])) * Bf16ToF32(problem.weight[c * problem.k + i]);
        sum += product;
        magnitude += std::abs(product);
      }
      const double bound = static_cast<double>(problem.k) / 16 * (17 * 0x1p-24 + 0x1p-23) * magnitude;
      outside += !(std::abs(std::bit_cast<float>(got[r * problem.n + c]) - sum) <= bound);  // a NaN counts
    }
  }
  EXPECT_EQ(outside, 0u);
}

template <int... kWidths>
void AddTiles(std::integer_sequence<int, kWidths...>, int warpgroups, int blocks, std::vector<LinearTile>& tiles) {
  (tiles.push_back({.warpgroups = warpgroups, .blocks = blocks, .features = kWidths}), ...);
}

// Every compiled tile: over ragged rows and features, fewer features than the tile's, a k of whole boxes and one that
// ends within a box.
TEST_F(CudaLinear, TilesGiveTheSameBits) {
  std::vector<LinearTile> tiles;
  AddTiles(LinearWidths1x1(), 1, 1, tiles);
  AddTiles(LinearWidths2x1(), 2, 1, tiles);
  AddTiles(LinearWidths2x2(), 2, 2, tiles);
  for (const auto& [n, k] : {std::pair{776, 768}, {776, 784}, {40, 768}}) {
    const Problem problem(600, n, k, 4);
    const std::vector<uint32_t> want = RunLinear<uint32_t>(problem, problem.m);
    for (const LinearTile& tile : tiles) {
      for (const int64_t rows : {1, 33, 130, 600}) {
        SCOPED_TRACE(::testing::Message() << tile.warpgroups << " x " << tile.blocks << " x " << tile.features << ", "
                                          << rows << " rows, n " << n << ", k " << k);
        ExpectSame(RunLinear<uint32_t>(problem, rows, &tile), FirstRows(want, rows, problem.n));
      }
    }
  }
}

TEST_F(CudaLinear, RowDoesNotDependOnTheOthers) {
  const Problem problem(2048, 512, 1024, 6);
  const Bits want = RunLinear<uint16_t>(problem, problem.m);
  for (const int64_t rows : {1, 2, 7, 8, 9, 16, 33, 64, 65, 128, 200, 256, 257, 512, 1000}) {
    SCOPED_TRACE(rows);
    ExpectSame(RunLinear<uint16_t>(problem, rows), FirstRows(want, rows, problem.n));
  }
}

// Infinities and NaNs stay in their own rows, whatever else a tile reads.
TEST_F(CudaLinear, BadRowsDoNotSpread) {
  Problem problem(40, 128, 512, 8);
  const Bits good = RunLinear<uint16_t>(problem, problem.m);
  std::fill_n(problem.x.begin() + 7 * problem.k, problem.k, uint16_t{0x7FC0});
  std::fill_n(problem.x.begin() + 33 * problem.k, problem.k, uint16_t{0x7F80});
  const Bits bad = RunLinear<uint16_t>(problem, problem.m);
  for (int64_t r = 0; r < problem.m; ++r) {
    SCOPED_TRACE(r);
    const Bits got(bad.begin() + r * problem.n, bad.begin() + (r + 1) * problem.n);
    if (r == 7 || r == 33) {
      for (const uint16_t b : got) EXPECT_TRUE(std::isnan(Bf16ToF32(b)));
    } else {
      ExpectSame(got, Bits(good.begin() + r * problem.n, good.begin() + (r + 1) * problem.n));
    }
  }
}

// Rows of x inside wider rows, and a launch that a graph replays.
TEST_F(CudaLinear, StridedInAGraph) {
  const Problem problem(9, 256, 768, 9);
  const Bits want = RunLinear<uint16_t>(problem, problem.m);
  const int64_t stride = problem.k + 24;
  Bits wide(problem.m * stride, kPoison);
  for (int64_t r = 0; r < problem.m; ++r) {
    std::copy_n(problem.x.begin() + r * problem.k, problem.k, wide.begin() + r * stride);
  }
  const DeviceArray<uint16_t> x(wide);
  const DeviceArray<uint16_t> weight(problem.weight);
  const DeviceArray<uint16_t> out(Bits(want.size(), kPoison));
  LinearParams params = {.x = x.bf16(),
                         .weight = weight.bf16(),
                         .out = out.data(),
                         .m = problem.m,
                         .n = problem.n,
                         .k = problem.k,
                         .x_stride = stride,
                         .out_stride = problem.n};
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_TRUE(LaunchLinear(params, stream).ok());
  params.early_start = true;
  EXPECT_TRUE(LaunchLinear(params, stream).ok());
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  EXPECT_EQ(out.Host(), Bits(want.size(), kPoison));
  cudaGraphExec_t instance = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&instance, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(instance, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  ExpectSame(out.Host(), want);
  EXPECT_EQ(cudaGraphExecDestroy(instance), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// From here on no GPU is needed: addresses are never followed.
template <class Change>
void ExpectRefused(LinearParams params, const char* field, Change change) {
  change(params);
  const absl::Status status = params.Validate();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
  EXPECT_THAT(std::string(status.message()), HasSubstr(field));
}

TEST(CudaLinearParams, NamesTheBadField) {
  using P = LinearParams;
  auto* const address = reinterpret_cast<__nv_bfloat16*>(uintptr_t{4096});
  const P good = {
      .x = address, .weight = address, .out = address, .m = 3, .n = 64, .k = 48, .x_stride = 48, .out_stride = 64};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefused(good, ".m:", [](P& p) { p.m = -1; });
  ExpectRefused(good, ".n:", [](P& p) { p.n = 60; });
  ExpectRefused(good, ".n:", [](P& p) { p.n = 0; });
  ExpectRefused(good, ".k:", [](P& p) { p.k = 40; });
  ExpectRefused(good, ".k:", [](P& p) { p.k = 0; });
  ExpectRefused(good, ".x:", [](P& p) { p.x = nullptr; });
  ExpectRefused(good, ".x:", [](P& p) { p.x += 4; });
  ExpectRefused(good, ".weight:", [](P& p) { p.weight = nullptr; });
  ExpectRefused(good, ".weight:", [](P& p) { p.weight += 4; });
  ExpectRefused(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefused(good, ".x_stride:", [](P& p) { p.x_stride = 40; });
  ExpectRefused(good, ".x_stride:", [](P& p) { p.x_stride = 52; });
  ExpectRefused(good, ".out_stride:", [](P& p) { p.out_stride = 56; });
  ExpectRefused(good, ".out_stride:", [](P& p) { p.out_stride = 68; });
}

}  // namespace
}  // namespace lockstep::cuda

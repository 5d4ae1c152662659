// The CUDA operations against PyTorch's own bits (tests/data/torch_ops) and an fp64 oracle. Validate()'s tests need no
// GPU; the others skip without one. The environment variable LOCKSTEP_TEST_DATA replaces the compiled-in folder, so
// that the binary runs on another machine.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

using ::testing::HasSubstr;
using Bits = std::vector<uint16_t>;

constexpr float kEps = 1e-6f;
constexpr uint16_t kPoison = 0xFFFF;  // a NaN no operation writes: the GPU's own is 0x7FFF

template <class T>
std::vector<T> ReadArray(const std::string& name) {
  const char* folder = std::getenv("LOCKSTEP_TEST_DATA");
  const std::string path = std::string(folder != nullptr ? folder : LOCKSTEP_TEST_DATA) + "/torch_ops/" + name;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  EXPECT_TRUE(file.good()) << path;
  const std::streamoff bytes = file.good() ? static_cast<std::streamoff>(file.tellg()) : 0;
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  return values;
}

Bits RandomBits(size_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Bits bits(count);
  for (uint16_t& b : bits) b = F32ToBf16(normal(generator));
  return bits;
}

// Device memory with a host vector's contents.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    EXPECT_EQ(cudaMalloc(&data_, size_ * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  __nv_bfloat16* bf16() const { return static_cast<__nv_bfloat16*>(data_); }
  std::vector<T> Host() const {
    std::vector<T> host(size_);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t size_;
};

DeviceArray<uint16_t> Poisoned(size_t count) {
  return DeviceArray<uint16_t>(Bits(count, kPoison));
}

void ExpectSameBits(const Bits& got, const Bits& want) {
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

class CudaOps : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

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
  constexpr int64_t kStride = 260;
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

// From here on no GPU is needed: addresses are never followed.
__nv_bfloat16* Address(uintptr_t address = 4096) {
  return reinterpret_cast<__nv_bfloat16*>(address);
}

template <class Params>
void ExpectRefused(const Params& params, const char* field) {
  const absl::Status status = params.Validate();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
  EXPECT_THAT(std::string(status.message()), HasSubstr(field));
}

template <class Params, class Change>
void ExpectRefusedAfter(Params params, const char* field, Change change) {
  change(params);
  ExpectRefused(params, field);
}

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

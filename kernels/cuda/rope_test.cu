// Rotary embedding against an fp64 oracle (transformers' bits: tests/gpu/check_attention.py). Validate()'s tests need
// no GPU; the others skip without one.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/rope.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kDim = 128;
constexpr int64_t kHalf = 64;
constexpr uint16_t kPoison = 0xFFFF;

template <class T>
T* ToDevice(const std::vector<T>& host) {
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, host.size() * sizeof(T)), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  return static_cast<T*>(data);
}

TEST(CudaRope, NearTheOracleAndTouchesItsColumnsOnly) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  constexpr int64_t kHeads = 5;
  constexpr int64_t kKvHeads = 2;
  constexpr int64_t kStride = (kHeads + kKvHeads) * kDim + 8;
  constexpr float kScaling = 1.2079441541679836f;
  // The fourth row is padding.
  const std::vector<int32_t> positions = {0, 1, 77, 0x3FFFFFFF, 4095, 65535, 1000000};
  const std::vector<int32_t> row_piece = {0, 0, 1, -1, 2, 3, 3};
  const auto rows = static_cast<int64_t>(positions.size());
  std::vector<float> inv_freq(kHalf);
  for (int64_t i = 0; i < kHalf; ++i) inv_freq[i] = static_cast<float>(std::pow(500000.0, -i / 64.0));
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> x(rows * kStride, kPoison);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < kStride - 8; ++i) x[r * kStride + i] = F32ToBf16(normal(generator));
  }
  uint16_t* device_x = ToDevice(x);
  int32_t* device_positions = ToDevice(positions);
  int32_t* device_row_piece = ToDevice(row_piece);
  float* device_inv_freq = ToDevice(inv_freq);
  auto* q = reinterpret_cast<__nv_bfloat16*>(device_x);
  const RopeParams params = {
      .batch = {.positions = device_positions, .row_piece = device_row_piece, .rows = static_cast<int32_t>(rows)},
      .q = q,
      .k = q + kHeads * kDim,
      .inv_freq = device_inv_freq,
      .heads = kHeads,
      .kv_heads = kKvHeads,
      .q_stride = kStride,
      .k_stride = kStride,
      .attention_scaling = kScaling};
  ASSERT_TRUE(LaunchRope(params, nullptr).ok());
  std::vector<uint16_t> got(x.size());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(got.data(), device_x, got.size() * 2, cudaMemcpyDeviceToHost), cudaSuccess);
  size_t outside = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < kStride; ++column) {
      const int64_t at = r * kStride + column;
      if (row_piece[r] < 0 || column >= kStride - 8) {
        EXPECT_EQ(got[at], x[at]) << "row " << r << " column " << column;
        continue;
      }
      const bool first = column % kDim < kHalf;
      const int64_t i = column % kHalf;
      const double angle = static_cast<float>(positions[r]) * inv_freq[i];  // the fp32 product is the definition
      const double own = Bf16ToF32(x[at]);
      const double other = Bf16ToF32(x[at + (first ? kHalf : -kHalf)]) * (first ? -1.0 : 1.0);
      const double want = (own * std::cos(angle) + other * std::sin(angle)) * kScaling;
      // bf16's rounding; before it cos and sin to 2 ulp, and three fp32 roundings of each term.
      const double fp32 = (std::abs(own) + std::abs(other)) * kScaling * 8 * 0x1p-24;
      outside += !(std::abs(Bf16ToF32(got[at]) - want) <= std::abs(want) * 0x1p-8 + fp32);
    }
  }
  EXPECT_EQ(outside, 0u);
  for (void* data : {static_cast<void*>(device_x), static_cast<void*>(device_positions),
                     static_cast<void*>(device_row_piece), static_cast<void*>(device_inv_freq)}) {
    cudaFree(data);
  }
}

template <class Change>
void ExpectRefusedAfter(RopeParams params, const char* field, Change change) {
  change(params);
  const absl::Status status = params.Validate();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
  EXPECT_THAT(std::string(status.message()), HasSubstr(field));
}

TEST(CudaParams, RopeNamesTheBadField) {
  using P = RopeParams;
  static const int32_t array[1] = {};
  static const float frequency = 1.0f;
  auto* address = reinterpret_cast<__nv_bfloat16*>(4096);
  const P good = {.batch = {.positions = array, .row_piece = array, .rows = 1},
                  .q = address,
                  .k = address,
                  .inv_freq = &frequency,
                  .heads = 2,
                  .kv_heads = 1,
                  .q_stride = 256,
                  .k_stride = 128};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".batch.rows", [](P& p) { p.batch.rows = -1; });
  ExpectRefusedAfter(good, ".q:", [](P& p) { p.q = nullptr; });
  ExpectRefusedAfter(good, ".k:", [](P& p) { p.k += 4; });
  ExpectRefusedAfter(good, ".inv_freq", [](P& p) { p.inv_freq = nullptr; });
  ExpectRefusedAfter(good, ".heads", [](P& p) { p.heads = 0; });
  ExpectRefusedAfter(good, ".kv_heads", [](P& p) { p.kv_heads = 0; });
  ExpectRefusedAfter(good, ".q_stride", [](P& p) { p.q_stride = 128; });
  ExpectRefusedAfter(good, ".k_stride", [](P& p) { p.k_stride = 132; });
  ExpectRefusedAfter(good, ".attention_scaling", [](P& p) { p.attention_scaling = INFINITY; });
  ExpectRefusedAfter(good, ".positions", [](P& p) { p.batch.positions = nullptr; });
  ExpectRefusedAfter(good, ".row_piece", [](P& p) { p.batch.row_piece = nullptr; });
}

}  // namespace
}  // namespace lockstep::cuda

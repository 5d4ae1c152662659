// PyTorch's RMSNorm on a GPU, emulated in plain C++ and held against its own bits (tests/data/torch_ops): where there
// is no GPU, this is what says that the order written in kernels/cuda/rms_norm.cu is the right one.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"

namespace lockstep {
namespace {

template <class T>
std::vector<T> ReadArray(const std::string& name) {
  const std::string path = std::string(LOCKSTEP_TEST_DATA) + "/torch_ops/" + name;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  EXPECT_TRUE(file.good()) << path;
  const std::streamoff bytes = file.good() ? static_cast<std::streamoff>(file.tellg()) : 0;
  std::vector<T> values(static_cast<size_t>(bytes) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  return values;
}

// 32 lanes; lane i has four accumulators over elements 4i..4i+3 of every 128; a tree of distance 16, 8, 4, 2, 1.
float MeanOfSquares(const uint16_t* x, int width) {
  std::array<float, 32> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    std::array<float, 4> sums = {};
    for (int i = 4 * lane; i < width; i += 128) {
      for (int k = 0; k < 4; ++k) sums[k] += Bf16ToF32(x[i + k]) * Bf16ToF32(x[i + k]);
    }
    lanes[lane] = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  }
  for (int distance = 16; distance >= 1; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) lanes[lane] += lanes[lane + distance];
  }
  return lanes[0] * (1.0f / static_cast<float>(width));
}

class RmsNormOrder : public ::testing::TestWithParam<int> {};

TEST_P(RmsNormOrder, MeanHasPyTorchsBits) {
  const int width = GetParam();
  const auto x = ReadArray<uint16_t>("rms" + std::to_string(width) + "_x.bf16");
  const auto mean = ReadArray<float>("rms" + std::to_string(width) + "_mean.f32");
  ASSERT_GE(mean.size(), 12u);
  ASSERT_EQ(x.size(), mean.size() * width);
  for (size_t r = 0; r < mean.size(); ++r) EXPECT_EQ(MeanOfSquares(&x[r * width], width), mean[r]) << "row " << r;
}

// The GPU's rsqrt is within 2 ulp of the exact value (CUDA C++ Programming Guide, accuracy of rsqrtf), so one of those
// five values must give all bits of a row.
TEST_P(RmsNormOrder, OutputHasPyTorchsBits) {
  const int width = GetParam();
  const auto x = ReadArray<uint16_t>("rms" + std::to_string(width) + "_x.bf16");
  const auto weight = ReadArray<uint16_t>("rms" + std::to_string(width) + "_w.bf16");
  const auto y = ReadArray<uint16_t>("rms" + std::to_string(width) + "_y.bf16");
  ASSERT_EQ(weight.size(), static_cast<size_t>(width));
  ASSERT_GE(x.size(), weight.size());
  ASSERT_EQ(x.size(), y.size());
  for (size_t begin = 0; begin < x.size(); begin += width) {
    const float mean_eps = MeanOfSquares(&x[begin], width) + 1e-6f;
    const uint32_t exact = std::bit_cast<uint32_t>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean_eps))));
    int fewest = width;
    for (uint32_t bits = exact - 2; bits <= exact + 2; ++bits) {
      int differing = 0;
      for (int i = 0; i < width; ++i) {
        const float scaled = Bf16ToF32(x[begin + i]) * std::bit_cast<float>(bits);
        differing += F32ToBf16(Bf16ToF32(weight[i]) * scaled) != y[begin + i];
      }
      fewest = std::min(fewest, differing);
    }
    EXPECT_EQ(fewest, 0) << "row " << begin / width;
  }
}

INSTANTIATE_TEST_SUITE_P(Widths, RmsNormOrder, ::testing::Values(192, 3840));

}  // namespace
}  // namespace lockstep

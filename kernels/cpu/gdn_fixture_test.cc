// The bf16 chunk program against a GPU's own output (tests/data/gdn_fixture). The casts are the same; the GPU's tensor
// cores truncate inside a sum and round toward zero, so bits agree only mostly.
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/gdn_chunk.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

constexpr int64_t kRows = 130;
constexpr GdnShape kShape = {.key_heads = 1, .value_heads = 1, .key_dim = 96, .value_dim = 192};

template <class T>
std::vector<T> ReadArray(const std::string& name, int64_t count) {
  const std::string path = std::string(LOCKSTEP_TEST_DATA) + "/gdn_fixture/" + name;
  std::ifstream file(path, std::ios::binary);
  std::vector<T> values(count);
  file.read(reinterpret_cast<char*>(values.data()), count * static_cast<int64_t>(sizeof(T)));
  EXPECT_EQ(file.gcount(), count * static_cast<int64_t>(sizeof(T))) << path;
  EXPECT_EQ(file.peek(), std::ifstream::traits_type::eof()) << path;
  return values;
}

void CopyColumns(const std::vector<uint16_t>& from, int64_t width, testing::Matrix& to, int64_t column) {
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < width; ++c) to.row(r)[column + c] = Bf16ToF32(from[r * width + c]);
  }
}

struct Agreement {
  double relative_error;  // of the norm
  double equal_share;     // of the elements, bit for bit
};

Agreement Compare(testing::Matrix& got, const std::vector<uint16_t>& want) {
  double error = 0.0;
  double norm = 0.0;
  int64_t equal = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < kShape.value_dim; ++c) {
      const float w = Bf16ToF32(want[r * kShape.value_dim + c]);
      error += std::pow(static_cast<double>(got.at(r, c)) - w, 2);
      norm += static_cast<double>(w) * w;
      equal += got.at(r, c) == w;
    }
  }
  return {std::sqrt(error / norm), static_cast<double>(equal) / static_cast<double>(kRows * kShape.value_dim)};
}

testing::Matrix RunFixture(const std::string& profile) {
  testing::Matrix qkv(kRows, kShape.conv_channels()), beta(kRows, 1), g(kRows, 1), out(kRows, kShape.value_dim);
  CopyColumns(ReadArray<uint16_t>("q.bf16", kRows * 96), 96, qkv, 0);
  CopyColumns(ReadArray<uint16_t>("k.bf16", kRows * 96), 96, qkv, 96);
  CopyColumns(ReadArray<uint16_t>("v.bf16", kRows * 192), 192, qkv, 192);
  const std::vector<float> betas = ReadArray<float>("beta.f32", kRows);
  const std::vector<float> gs = ReadArray<float>("g.f32", kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    *beta.row(r) = betas[r];
    *g.row(r) = gs[r];
  }
  testing::TestContext context(profile);
  AlignedBuffer slot(CpuGdnStateBytes(context.get(), kShape));
  CpuGdnResetState(context.get(), kShape, slot.data());
  const Piece piece = {.row_begin = 0, .row_count = kRows, .position = 0, .gdn_state = slot.data()};
  CpuGdnChunk(context.get(), qkv.view(), beta.view(), g.view(), kShape, {&piece, 1}, out.view());
  return out;
}

// Where the sum before a rounding differs in its last fp32 bits, the rounding flips rarely; each flip (of q, k, T, u,
// w, v', P) moves later rows by less than a bf16 step. So most elements are equal, and the error of the norm stays
// below half of one bf16 rounding, 2^-9.
TEST(GdnFixture, Bf16ProgramFollowsTheGpu) {
  testing::Matrix out = RunFixture("hf");
  const Agreement agreement = Compare(out, ReadArray<uint16_t>("o.bf16", kRows * 192));
  RecordProperty("relative_error", std::to_string(agreement.relative_error));
  RecordProperty("equal_share", std::to_string(agreement.equal_share));
  EXPECT_TRUE(agreement.relative_error < testing::kUnitBf16 / 2) << agreement.relative_error;
  EXPECT_GT(agreement.equal_share, 0.85);
}

// The test above can fail: the fp32 program, whose casts are not the GPU's, is near too, but equal in far fewer
// elements.
TEST(GdnFixture, Fp32ProgramDoesNot) {
  testing::Matrix out = RunFixture("hf-torch");
  const Agreement agreement = Compare(out, ReadArray<uint16_t>("o.bf16", kRows * 192));
  RecordProperty("relative_error", std::to_string(agreement.relative_error));
  RecordProperty("equal_share", std::to_string(agreement.equal_share));
  EXPECT_TRUE(agreement.relative_error < 4 * testing::kUnitBf16) << agreement.relative_error;
  EXPECT_LT(agreement.equal_share, 0.5);
}

}  // namespace
}  // namespace lockstep

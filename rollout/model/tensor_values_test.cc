#include "rollout/model/tensor_values.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace lockstep {
namespace {

TEST(TensorValues, ToFloatIsExact) {
  const std::vector<float> fp32 = {1.5f, -0.0f, 1e-40f, 3e38f};
  EXPECT_EQ(ToFloat({.data = fp32.data(), .count = 4, .dtype = DType::kF32}), fp32);
  const std::vector<uint16_t> bf16 = {0x3FC0, 0x8000, 0x0001, 0xC2F7};
  EXPECT_EQ(ToFloat({.data = bf16.data(), .count = 4, .dtype = DType::kBF16}),
            (std::vector<float>{1.5f, -0.0f, 0x1p-133f, -123.5f}));
  const std::vector<uint16_t> fp16 = {0x3E00, 0x8000, 0x0001, 0xFBFF};
  EXPECT_EQ(ToFloat({.data = fp16.data(), .count = 4, .dtype = DType::kF16}),
            (std::vector<float>{1.5f, -0.0f, 0x1p-24f, -65504.0f}));
  EXPECT_TRUE(ToFloat({.data = nullptr, .count = 0, .dtype = DType::kF32}).empty());
}

TEST(TensorValues, FindsEveryKindOfNonFiniteAnywhere) {
  ThreadPool threads(3);
  constexpr int64_t kCount = 700'001;  // several blocks, and a tail
  const struct {
    DType dtype;
    uint32_t one;
    std::vector<uint32_t> bad;
    uint32_t largest;
  } kinds[] = {
      {DType::kF32, 0x3F800000u, {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0x7F800001u, 0xFFFFFFFFu}, 0x7F7FFFFFu},
      {DType::kBF16, 0x3F80u, {0x7F80u, 0xFF80u, 0x7FC0u, 0x7F81u, 0xFFFFu}, 0x7F7Fu},
      {DType::kF16, 0x3C00u, {0x7C00u, 0xFC00u, 0x7E00u, 0x7C01u, 0xFFFFu}, 0x7BFFu},
  };
  for (const auto& kind : kinds) {
    const auto width = static_cast<size_t>(DTypeBytes(kind.dtype));
    std::vector<std::byte> data(kCount * width);
    const auto put = [&](int64_t i, uint32_t bits) { std::memcpy(data.data() + i * width, &bits, width); };
    for (int64_t i = 0; i < kCount; ++i) put(i, i % 2 == 0 ? kind.one : kind.largest);
    const TensorValues values{.data = data.data(), .count = kCount, .dtype = kind.dtype};
    EXPECT_EQ(FindNonFinite(values, threads).count, 0);
    EXPECT_EQ(FindNonFinite(values, threads).first, -1);
    for (uint32_t bad : kind.bad) {
      for (int64_t place : {int64_t{0}, int64_t{262'143}, int64_t{262'144}, kCount - 1}) {
        put(place, bad);
        EXPECT_EQ(FindNonFinite(values, threads).count, 1);
        EXPECT_EQ(FindNonFinite(values, threads).first, place);
        put(place, kind.one);
      }
    }
    put(5, kind.bad[0]);
    put(600'000, kind.bad[1]);
    EXPECT_EQ(FindNonFinite(values, threads).count, 2);
    EXPECT_EQ(FindNonFinite(values, threads).first, 5);
  }
}

}  // namespace
}  // namespace lockstep

// Both attention programs against a GPU's rows (tests/data/gpu_bits), what each wrong order would get wrong, and what a
// row may read.
#include "kernels/oracle/attention.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/test_data.h"

namespace lockstep::oracle {
namespace {

constexpr int kDim = 128;
const float kScale = static_cast<float>(1.0 / std::sqrt(128.0));
constexpr uint16_t kNan = 0x7FC0;

struct Recording {
  std::vector<int32_t> rows = ReadData<int32_t>("gpu_bits/attention_rows.i32");
  std::vector<uint16_t> q = ReadData<uint16_t>("gpu_bits/attention_q.bf16");
  std::vector<uint16_t> k = ReadData<uint16_t>("gpu_bits/attention_k.bf16");
  std::vector<uint16_t> v = ReadData<uint16_t>("gpu_bits/attention_v.bf16");
  std::vector<uint16_t> flash = ReadData<uint16_t>("gpu_bits/attention_flash.bf16");
  std::vector<uint16_t> cudnn = ReadData<uint16_t>("gpu_bits/attention_cudnn.bf16");

  AttentionHead Head() const {
    return {.head_dim = kDim, .k = k.data(), .v = v.data(), .key_stride = kDim, .scale = kScale};
  }
};

const Recording& Gpu() {
  static const Recording recording;
  return recording;
}

std::vector<uint16_t> AllRows(AttentionOrder order, Function exp2 = Exp2Approx) {
  std::vector<uint16_t> out(Gpu().q.size());
  for (size_t r = 0; r < Gpu().rows.size(); ++r) {
    AttentionRow(Gpu().Head(), order, &Gpu().q[r * kDim], Gpu().rows[r], 0, &out[r * kDim], exp2);
  }
  return out;
}

TEST(Attention, BothProgramsHaveTheGpusBits) {
  EXPECT_EQ(Differing(AllRows(kFlash2Order), Gpu().flash), 0);
  EXPECT_EQ(Differing(AllRows(kCudnnOrder), Gpu().cudnn), 0);
}

TEST(AttentionMutants, ThePrograms) {
  EXPECT_GT(Differing(AllRows(kCudnnOrder), Gpu().flash), 20);
  EXPECT_GT(Differing(AllRows(kFlash2Order), Gpu().cudnn), 20);
}

TEST(AttentionMutants, TheTiles) {
  AttentionOrder order = kFlash2Order;
  order.backward = false;
  EXPECT_GT(Differing(AllRows(order), Gpu().flash), 20);
  order = kFlash2Order;
  order.tile_keys = 128;
  EXPECT_GT(Differing(AllRows(order), Gpu().flash), 20);
  order = kCudnnOrder;
  order.backward = true;
  EXPECT_GT(Differing(AllRows(order), Gpu().cudnn), 20);
  order = kCudnnOrder;
  order.tile_keys = 64;
  EXPECT_GT(Differing(AllRows(order), Gpu().cudnn), 20);
}

// A last bit of fp32 changes few roundings to bf16.
TEST(AttentionMutants, TheShrinkOfTheSums) {
  AttentionOrder order = kCudnnOrder;
  order.shrink_scaled = false;
  EXPECT_GT(Differing(AllRows(order), Gpu().cudnn), 0);
}

TEST(AttentionMutants, Exp2) {
  auto coarse = [](float x) { return Exp2Approx(x) * (1.0f + 0x1p-20f); };
  EXPECT_GT(Differing(AllRows(kFlash2Order, coarse), Gpu().flash), 0);
}

class RandomHead : public ::testing::Test {
 protected:
  RandomHead() {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    for (std::vector<uint16_t>* values : {&q_, &k_, &v_}) {
      for (int i = 0; i < (values == &q_ ? 1 : kKeys) * kSmallDim; ++i) values->push_back(F32ToBf16(normal(random)));
    }
  }

  static constexpr int kKeys = 300;
  static constexpr int kSmallDim = 32;

  AttentionHead Head(int first_key = 0) const {
    return {.head_dim = kSmallDim,
            .k = &k_[first_key * kSmallDim],
            .v = &v_[first_key * kSmallDim],
            .key_stride = kSmallDim,
            .scale = 0.176f};
  }

  std::vector<uint16_t> Row(const AttentionHead& head, AttentionOrder order, int position, int window) const {
    std::vector<uint16_t> out(kSmallDim);
    AttentionRow(head, order, q_.data(), position, window, out.data());
    return out;
  }

  std::vector<uint16_t> q_, k_, v_;
};

TEST_F(RandomHead, KeysOutsideAreNotRead) {
  constexpr int kPosition = 250, kWindow = 90;
  for (const AttentionOrder order : {kFlash2Order, kCudnnOrder}) {
    const std::vector<uint16_t> want = Row(Head(), order, kPosition, kWindow);
    const std::vector<uint16_t> k = k_, v = v_;
    for (int j = 0; j < kKeys; ++j) {
      if (j > kPosition - kWindow && j <= kPosition) continue;
      for (int x = 0; x < kSmallDim; ++x) k_[j * kSmallDim + x] = v_[j * kSmallDim + x] = kNan;
    }
    EXPECT_EQ(Differing(Row(Head(), order, kPosition, kWindow), want), 0);
    // The window's first and last keys are read.
    for (const int edge : {kPosition - kWindow + 1, kPosition}) {
      v_[edge * kSmallDim] = kNan;
      EXPECT_GT(Differing(Row(Head(), order, kPosition, kWindow), want), 0);
      v_[edge * kSmallDim] = v[edge * kSmallDim];
    }
    k_ = k;
    v_ = v;
  }
}

TEST_F(RandomHead, AWindowOverAllKeysIsNone) {
  for (const AttentionOrder order : {kFlash2Order, kCudnnOrder}) {
    for (const int position : {0, 63, 64, 200}) {
      EXPECT_EQ(Differing(Row(Head(), order, position, position + 1), Row(Head(), order, position, 0)), 0);
      EXPECT_EQ(Differing(Row(Head(), order, position, 1000), Row(Head(), order, position, 0)), 0);
    }
  }
}

// Tiles are counted from key 0, so only a window that begins with a tile is full attention over its own keys.
TEST_F(RandomHead, AWindowFromATileOnIsASequenceOfItsOwn) {
  for (const AttentionOrder order : {kFlash2Order, kCudnnOrder}) {
    EXPECT_EQ(Differing(Row(Head(), order, 290, 290 - 128 + 1), Row(Head(128), order, 290 - 128, 0)), 0);
  }
}

TEST_F(RandomHead, IsSoftmaxAttention) {
  for (const AttentionOrder order : {kFlash2Order, kCudnnOrder}) {
    for (const int window : {0, 100}) {
      const int position = 280;
      const int first = window > 0 ? position - window + 1 : 0;
      std::vector<double> sums(kSmallDim, 0.0);
      double total = 0.0;
      for (int j = first; j <= position; ++j) {
        double score = 0.0;
        for (int x = 0; x < kSmallDim; ++x) {
          score += static_cast<double>(Bf16ToF32(q_[x])) * Bf16ToF32(k_[j * kSmallDim + x]);
        }
        const double numerator = std::exp(score * 0.176);
        total += numerator;
        for (int x = 0; x < kSmallDim; ++x) sums[x] += numerator * Bf16ToF32(v_[j * kSmallDim + x]);
      }
      const std::vector<uint16_t> got = Row(Head(), order, position, window);
      double error = 0.0, norm = 0.0;
      for (int x = 0; x < kSmallDim; ++x) {
        error += std::pow(Bf16ToF32(got[x]) - sums[x] / total, 2);
        norm += std::pow(sums[x] / total, 2);
      }
      // Numerators and output are rounded to bf16.
      EXPECT_LT(std::sqrt(error / norm), 2 * 0x1p-9);
    }
  }
}

}  // namespace
}  // namespace lockstep::oracle

// Shared by the tests of the CPU operations: poisoned matrices, random values, bit comparison, and a loop over the
// instruction sets of this machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/float_bits.h"
#include "kernels/ops.h"
#include "spdlog/sinks/stdout_sinks.h"

namespace lockstep::testing {

// Half the distance between neighbouring values around 1: the relative error of one rounding.
constexpr double kUnitF32 = 0x1p-24;
constexpr double kUnitBf16 = 0x1p-8;

// A NaN no operation produces, so that a word left alone is told from a word written.
constexpr uint32_t kPoison = 0x7FDEAD01u;

// A matrix whose rows have padding behind them and whose whole storage, one guard row on either side included, begins
// as poison.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t width, int64_t padding = 5)
      : rows_(rows), width_(width), stride_(width + padding), words_((rows + 2) * stride_, kPoison) {}

  Rows view() { return {data(), rows_, width_, stride_}; }
  float* row(int64_t r) { return data() + r * stride_; }
  float at(int64_t r, int64_t c) { return row(r)[c]; }
  uint32_t bits(int64_t r, int64_t c) { return words_[(r + 1) * stride_ + c]; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }

  // Normal values times `scale`, rounded to bf16 if asked.
  Matrix& Fill(uint32_t seed, bool bf16, float scale = 1.0f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) {
        const float value = normal(generator);
        row(r)[c] = bf16 ? RoundBf16(value) : value;
      }
    }
    return *this;
  }

  // Number of words outside [rows, width] that are no longer poison.
  int64_t TouchedOutside() const {
    int64_t touched = 0;
    for (size_t i = 0; i < words_.size(); ++i) {
      const int64_t r = static_cast<int64_t>(i) / stride_ - 1;
      const int64_t c = static_cast<int64_t>(i) % stride_;
      const bool inside = r >= 0 && r < rows_ && c < width_;
      if (!inside && words_[i] != kPoison) ++touched;
    }
    return touched;
  }

  // Number of words inside [rows, width] that were never written.
  int64_t Unwritten() {
    int64_t unwritten = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) unwritten += bits(r, c) == kPoison;
    }
    return unwritten;
  }

 private:
  float* data() { return reinterpret_cast<float*>(words_.data()) + stride_; }

  int64_t rows_;
  int64_t width_;
  int64_t stride_;
  std::vector<uint32_t> words_;
};

// Number of rows [0, count) in which a's row `a_begin + r` and b's row `b_begin + r` differ in a bit.
inline int64_t DifferingRows(Matrix& a, int64_t a_begin, Matrix& b, int64_t b_begin, int64_t count) {
  int64_t differing = 0;
  for (int64_t r = 0; r < count; ++r) {
    differing += std::memcmp(a.row(a_begin + r), b.row(b_begin + r), a.width() * sizeof(float)) != 0;
  }
  return differing;
}

// Runs `body` once per instruction set that is compiled in and that this CPU has, AVX512-BF16 last where it has that.
inline void ForEachTarget(const std::function<void()>& body) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  ASSERT_FALSE(targets.empty()) << "this CPU has none of the instruction sets compiled in";
  for (const int64_t target : targets) {
    SCOPED_TRACE(std::string("target ") + hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    HideBf16DotForTest(true);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  HideBf16DotForTest(false);
  if (HasBf16Dot()) {
    SCOPED_TRACE("AVX-512 with the bf16 dot product");
    body();
  }
}

// Death tests read stderr; spdlog's default logger writes to stdout.
inline void LogToStderr() {
  spdlog::set_default_logger(std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::stderr_sink_mt>()));
}

// A profile by name with a thread pool and scratch of its own.
class TestContext {
 public:
  explicit TestContext(std::string_view profile, int threads = 1)
      : profile_(FindNumericsProfile(profile).value()), pool_(threads), scratch_(threads) {}
  CpuContext get() { return {profile_, pool_, scratch_}; }
  bool bf16() const { return profile_.activations == DType::kBF16; }

 private:
  NumericsProfile profile_;
  ThreadPool pool_;
  ThreadScratch scratch_;
};

}  // namespace lockstep::testing

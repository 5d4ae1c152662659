// The linear layer: its profile's order of k in bits, its fp64 oracle, and independence of rows, threads and
// instruction set.
#include "kernels/cpu/linear.h"

#include <cmath>
#include <vector>

#include "kernels/cpu/flush_subnormals.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::DifferingRows;
using testing::ForEachTarget;
using testing::kUnitBf16;
using testing::kUnitF32;
using testing::LogToStderr;
using testing::Matrix;
using testing::TestContext;

const int64_t kInFeatures[] = {1, 15, 16, 17, 96, 256, 1000, 3840};
const int64_t kOutFeatures[] = {1, 2, 30, 31, 32, 33, 100, 257, 1024};
const int64_t kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64, 200};
constexpr int64_t kMostRows = 200;

// [out, in] weights as fp32 values (bf16 ones if asked) and, for PackLinear, dense storage.
struct Weights {
  Weights(int64_t rows, int64_t cols, uint32_t seed, bool bf16) : out(rows), in(cols) {
    Matrix m(rows, cols, 0);
    m.Fill(seed, bf16);
    values.assign(m.row(0), m.row(0) + rows * cols);
  }
  HostMatrix host() const { return {values.data(), out, in, DType::kF32}; }
  float at(int64_t n, int64_t k) const { return values[n * in + k]; }

  int64_t out;
  int64_t in;
  std::vector<float> values;
};

float Chain(const float* x, const Weights& w, int64_t n) {
  float sum = 0;
  for (int64_t k = 0; k < w.in; ++k) sum = std::fma(x[k], w.at(n, k), sum);
  return sum;
}

// LinearProgram::kTorchCpuPairs. Callers flush subnormals where there are any.
float PairsInBlocks(const float* x, const Weights& w, int64_t n) {
  const int64_t block = w.in <= 1024 ? 512 : 1024;
  float sum = 0;
  for (int64_t k = 0; k < w.in; k += block) {
    float chain = 0;
    for (int64_t i = k; i < std::min(k + block, w.in); i += 2) {
      if (i + 1 < w.in) chain = std::fma(x[i + 1], w.at(n, i + 1), chain);
      chain = std::fma(x[i], w.at(n, i), chain);
    }
    sum += chain;
  }
  return sum;
}

float InOrder(std::string_view profile, const float* x, const Weights& w, int64_t n) {
  return profile == "hf-torch" ? PairsInBlocks(x, w, n) : Chain(x, w, n);
}

// Every output for small shapes; for large ones about 100, among them the corners.
template <class Fn>
void ForSampledOutputs(int64_t rows, int64_t columns, int64_t depth, Fn check) {
  const int64_t step = std::max<int64_t>(1, rows * columns * depth / 1'000'000 * 2 + 1);
  for (int64_t i = 0; i < rows * columns; i += step) check(i / columns, i % columns);
  check(0, columns - 1);
  check(rows - 1, 0);
  check(rows - 1, columns - 1);
}

void CheckShape(std::string_view profile, int64_t out_features, int64_t in_features) {
  SCOPED_TRACE(::testing::Message() << profile << " N " << out_features << " K " << in_features);
  TestContext context(profile);
  const bool bf16 = context.bf16();
  const Weights w(out_features, in_features, 7, bf16);
  const HostMatrix host = w.host();
  const auto packed = CpuPackLinear(context.get(), {&host, 1});
  ASSERT_EQ(packed->out_features(), out_features);
  ASSERT_EQ(packed->in_features(), in_features);
  Matrix x(kMostRows, in_features);
  x.Fill(11, bf16);
  Matrix most(kMostRows, out_features);
  CpuLinear(context.get(), x.view(), *packed, most.view());
  EXPECT_EQ(most.Unwritten(), 0);
  EXPECT_EQ(most.TouchedOutside(), 0);

  ForSampledOutputs(kMostRows, out_features, in_features, [&](int64_t r, int64_t n) {
    const float chain = InOrder(profile, x.row(r), w, n);
    ASSERT_EQ(std::bit_cast<uint32_t>(bf16 ? RoundBf16(chain) : chain), most.bits(r, n)) << r << ", " << n;
    double exact = 0;
    double magnitude = 0;
    for (int64_t k = 0; k < in_features; ++k) {
      const double product = static_cast<double>(x.at(r, k)) * w.at(n, k);
      exact += product;
      magnitude += std::abs(product);
    }
    // K roundings, each at most a unit of a partial sum, which sum |x w| bounds; then one to bf16.
    const double chain_bound = static_cast<double>(in_features) * kUnitF32 * magnitude;
    const double bound = chain_bound + (bf16 ? kUnitBf16 * (std::abs(exact) + chain_bound) : 0);
    ASSERT_LE(std::abs(most.at(r, n) - exact), bound) << r << ", " << n;
  });

  for (const int64_t rows : kRowCounts) {
    Matrix out(rows, out_features);
    CpuLinear(context.get(), x.view().slice(0, rows), *packed, out.view());
    EXPECT_EQ(DifferingRows(out, 0, most, 0, rows), 0) << rows << " rows";
    EXPECT_EQ(out.TouchedOutside(), 0) << rows << " rows";
    // The last rows too, so that a row is seen at every height of a tile.
    Matrix tail(rows, out_features);
    CpuLinear(context.get(), x.view().slice(kMostRows - rows, rows), *packed, tail.view());
    EXPECT_EQ(DifferingRows(tail, 0, most, kMostRows - rows, rows), 0) << "last " << rows << " rows";
  }
}

TEST(Linear, Bf16IsTheChainForEveryShapeAndRowCount) {
  for (const int64_t n : kOutFeatures) {
    for (const int64_t k : kInFeatures) CheckShape("hf", n, k);
  }
}

TEST(Linear, Fp32IsTheChainForEveryShapeAndRowCount) {
  for (const int64_t n : kOutFeatures) {
    for (const int64_t k : {1, 17, 256, 1000}) CheckShape("fp32", n, k);
  }
}

TEST(Linear, Bf16PairsAreInOrderForEveryShapeAndRowCount) {
  for (const bool hide : {false, true}) {
    HideBf16DotForTest(hide);
    for (const int64_t n : {1, 30, 33, 257}) {
      for (const int64_t k : {1, 2, 15, 17, 256, 511, 513, 1000, 1024, 1025, 2051}) CheckShape("hf-torch", n, k);
    }
  }
  HideBf16DotForTest(false);
}

// Subnormal weights, activations, products and sums: zero with the dot product instruction and without.
TEST(Linear, Bf16PairsTakeSubnormalsAsZeroOnEveryTarget) {
  constexpr int64_t kRows = 13;
  Weights w(40, 700, 17, true);
  Matrix x(kRows, w.in);
  x.Fill(18, true);
  std::mt19937 generator(19);
  // Products and sums around the smallest normal number, 2^-126; and a subnormal of
  // each times a large number.
  const auto small = [&](float value) { return RoundBf16(std::ldexp(value, static_cast<int>(generator() % 13) - 71)); };
  for (float& v : w.values) v = small(v);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < w.in; ++k) x.row(r)[k] = small(x.row(r)[k]);
    x.row(r)[5] = 0x1p-130f;
    x.row(r)[6] = 0x1p+6f;
  }
  for (int64_t n = 0; n < w.out; ++n) {
    w.values[n * w.in + 5] = 0x1p+6f;
    w.values[n * w.in + 6] = 0x1p-130f;
  }
  const HostMatrix host = w.host();
  NumericsProfile profile = FindNumericsProfile("hf-torch").value();
  profile.logits = DType::kF32;
  ThreadPool pool(2);
  ThreadScratch scratch(2);
  const CpuContext context{profile, pool, scratch};
  const auto packed = CpuPackLinear(context, {&host, 1});
  // Volatile: to the compiler two calls in two floating-point modes are one.
  float (*volatile in_order)(const float*, const Weights&, int64_t) = &PairsInBlocks;
  ForEachTarget([&] {
    Matrix out(kRows, w.out);
    CpuLogits(context, x.view(), *packed, out.view());
    int64_t normal = 0;
    int64_t gradual = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t n = 0; n < w.out; ++n) {
        const float unflushed = in_order(x.row(r), w, n);
        const FlushSubnormals flush;
        const float flushed = in_order(x.row(r), w, n);
        ASSERT_EQ(out.bits(r, n), std::bit_cast<uint32_t>(flushed)) << r << ", " << n;
        normal += flushed != 0;
        gradual += std::bit_cast<uint32_t>(unflushed) != std::bit_cast<uint32_t>(flushed);
      }
    }
    EXPECT_GT(normal, 0);
    EXPECT_GT(gradual, kRows * w.out / 2) << "without subnormals the test says nothing";
  });
  const volatile float smallest = 0x1p-149f;
  EXPECT_GT(smallest * 1.0f, 0.0f) << "the caller's floating-point mode must be as before";
}

TEST(Linear, SameBitsWithAnyThreadsAndTarget) {
  for (const char* profile : {"hf", "hf-torch", "fp32"}) {
    const Weights w(1057, 1000, 3, profile != std::string_view("fp32"));
    const HostMatrix host = w.host();
    for (const int64_t rows : {1, 2, 5, 7, 12, 13, 64, 200}) {
      SCOPED_TRACE(::testing::Message() << profile << " rows " << rows);
      Matrix x(rows, w.in);
      x.Fill(5, profile != std::string_view("fp32"));
      Matrix first(rows, w.out);
      bool have_first = false;
      for (const int threads : {1, 2, 3}) {
        TestContext context(profile, threads);
        const auto packed = CpuPackLinear(context.get(), {&host, 1});
        ForEachTarget([&] {
          Matrix out(rows, w.out);
          CpuLinear(context.get(), x.view(), *packed, out.view());
          EXPECT_EQ(out.Unwritten(), 0);
          EXPECT_EQ(out.TouchedOutside(), 0);
          if (!have_first) first = out;
          have_first = true;
          EXPECT_EQ(DifferingRows(out, 0, first, 0, rows), 0) << threads << " threads";
        });
      }
    }
  }
}

TEST(Linear, LargeDepthCrossesBlocksOfKOnEveryTarget) {
  // 200 rows take the chain's k in blocks of about 500, one row in one: both must give the chain.
  const Weights w(70, 11008, 9, true);
  const HostMatrix host = w.host();
  for (const char* profile : {"hf", "hf-torch"}) {
    TestContext context(profile, 2);
    const auto packed = CpuPackLinear(context.get(), {&host, 1});
    Matrix x(200, w.in);
    x.Fill(13, true);
    ForEachTarget([&] {
      Matrix out(200, w.out);
      CpuLinear(context.get(), x.view(), *packed, out.view());
      for (const int64_t r : {0, 11, 12, 100, 199}) {
        for (const int64_t n : {0, 15, 16, 31, 32, 64, 69}) {
          EXPECT_EQ(out.at(r, n), RoundBf16(InOrder(profile, x.row(r), w, n))) << profile << ": " << r << ", " << n;
        }
      }
    });
  }
}

TEST(Linear, LogitsRoundAsTheProfileSaysAndLinearAsItsActivations) {
  NumericsProfile profile = FindNumericsProfile("hf").value();
  profile.logits = DType::kF32;
  ThreadPool pool(1);
  ThreadScratch scratch(1);
  const CpuContext context{profile, pool, scratch};
  const Weights w(40, 100, 1, true);
  const HostMatrix host = w.host();
  const auto packed = CpuPackLinear(context, {&host, 1});
  Matrix x(3, 100);
  x.Fill(2, true);
  Matrix logits(3, 40);
  Matrix linear(3, 40);
  CpuLogits(context, x.view(), *packed, logits.view());
  CpuLinear(context, x.view(), *packed, linear.view());
  int64_t rounded = 0;
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t n = 0; n < 40; ++n) {
      EXPECT_EQ(logits.at(r, n), Chain(x.row(r), w, n));
      EXPECT_EQ(linear.at(r, n), RoundBf16(logits.at(r, n)));
      rounded += linear.at(r, n) != logits.at(r, n);
    }
  }
  EXPECT_GT(rounded, 100) << "fp32 logits should keep bits that bf16 drops";
}

// Parts of all three dtypes, stacked, equal the same rows given as one fp32 matrix, for both weight formats.
TEST(PackLinear, StacksPartsOfAnyDtypeAndRounds) {
  const int64_t in = 130;
  std::vector<float> f32(9 * in);
  std::vector<uint16_t> bf16(33 * in);
  std::vector<uint16_t> f16(5 * in);
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  for (float& v : f32) v = normal(generator);
  for (uint16_t& v : bf16) v = F32ToBf16(normal(generator));
  for (uint16_t& v : f16) v = static_cast<uint16_t>(generator() % 0x7C00u | (generator() & 0x8000u));
  Weights all(47, in, 1, false);
  for (int64_t i = 0; i < 47 * in; ++i) {
    const int64_t r = i / in;
    all.values[i] = r < 9 ? f32[i] : r < 42 ? Bf16ToF32(bf16[i - 9 * in]) : F16ToF32(f16[i - 42 * in]);
  }
  const HostMatrix parts[] = {
      {f32.data(), 9, in, DType::kF32}, {bf16.data(), 33, in, DType::kBF16}, {f16.data(), 5, in, DType::kF16}};
  const HostMatrix whole = all.host();
  for (const char* profile : {"hf", "hf-torch", "fp32"}) {
    TestContext context(profile, 2);
    const auto from_parts = CpuPackLinear(context.get(), parts);
    const auto from_whole = CpuPackLinear(context.get(), {&whole, 1});
    EXPECT_EQ(from_parts->bytes(), 64 * in * (context.bf16() ? 2 : 4));
    Matrix x(2, in);
    x.Fill(8, context.bf16());
    Matrix a(2, 47);
    Matrix b(2, 47);
    CpuLinear(context.get(), x.view(), *from_parts, a.view());
    CpuLinear(context.get(), x.view(), *from_whole, b.view());
    EXPECT_EQ(DifferingRows(a, 0, b, 0, 2), 0) << profile;
    Weights rounded = all;
    if (context.bf16()) {
      for (float& v : rounded.values) v = RoundBf16(v);
    }
    for (int64_t n = 0; n < 47; ++n) {
      const float chain = InOrder(profile, x.row(1), rounded, n);
      EXPECT_EQ(a.at(1, n), context.bf16() ? RoundBf16(chain) : chain) << profile << " " << n;
    }
  }
}

TEST(Linear, ReadsAColumnViewAndWritesOne) {
  TestContext context("hf");
  const Weights w(33, 20, 4, true);
  const HostMatrix host = w.host();
  const auto packed = CpuPackLinear(context.get(), {&host, 1});
  Matrix x(4, 50);
  x.Fill(6, true);
  Matrix out(4, 100);
  CpuLinear(context.get(), x.view().columns(7, 20), *packed, out.view().columns(40, 33));
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t c = 0; c < 100; ++c) {
      if (c >= 40 && c < 73) {
        EXPECT_EQ(out.at(r, c), RoundBf16(Chain(x.row(r) + 7, w, c - 40)));
      } else {
        EXPECT_EQ(out.bits(r, c), testing::kPoison);
      }
    }
  }
}

TEST(Linear, NoRowsIsNoWork) {
  TestContext context("hf");
  const Weights w(3, 2, 4, true);
  const HostMatrix host = w.host();
  const auto packed = CpuPackLinear(context.get(), {&host, 1});
  CpuLinear(context.get(), {nullptr, 0, 2, 2}, *packed, {nullptr, 0, 3, 3});
}

TEST(LinearDeathTest, AWrongShapeIsACheck) {
  LogToStderr();
  TestContext context("hf");
  const Weights w(3, 2, 4, true);
  const HostMatrix host = w.host();
  const auto packed = CpuPackLinear(context.get(), {&host, 1});
  Matrix x(1, 3);
  Matrix out(1, 3);
  EXPECT_DEATH(CpuLinear(context.get(), x.view(), *packed, out.view()), "Linear: x \\[1, 3\\], weight \\[3, 2\\]");
}

}  // namespace
}  // namespace lockstep

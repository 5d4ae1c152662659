// A Hopper tensor core's arithmetic, bit for bit, in integers.
//
// One step adds the products of a group of factors to an fp32 accumulator: every product, and the accumulator, is
// shifted to the largest exponent among them and cut to 25 fractional bits; the sum is exact, and is cut to fp32
// (rounded toward zero, into the subnormal range too). So the order inside a group does not matter, and the order of
// the groups does. A group is 16 products of bf16 or 8 of tf32.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lockstep::oracle {

constexpr int kBf16Group = 16;
constexpr int kTf32Group = 8;

// A factor as the multiplier takes it: significand * 2^(exponent - 23).
struct Factor {
  int32_t significand = 0;  // signed, 23 fractional bits; of a special value: 0 for NaN, else the sign of the infinity
  int32_t exponent = kZeroExponent;  // kSpecialExponent for infinities and NaN

  static constexpr int32_t kZeroExponent = -(1 << 18);  // below every other, so that a zero never sets the alignment
  static constexpr int32_t kSpecialExponent = 1 << 20;  // above every other, whatever it is multiplied with
};

Factor MakeFactor(float value);      // any value; bf16 is the upper half of one
Factor MakeTf32Factor(float value);  // the low 13 bits are cut off, not rounded

// One step over a.size() == b.size() factors, which are one group.
float FusedStep(float accumulator, std::span<const Factor> a, std::span<const Factor> b);

// Steps over consecutive groups; the last may be shorter.
float Chain(float accumulator, std::span<const Factor> a, std::span<const Factor> b, int group = kBf16Group);

// Rows of factors along the dimension that a product sums over.
class FactorMatrix {
 public:
  FactorMatrix(int rows, int depth) : rows_(rows), depth_(depth), factors_(static_cast<size_t>(rows) * depth) {}

  // value(row, k) for all k; `make` is MakeFactor or MakeTf32Factor.
  template <class Value>
  static FactorMatrix Of(int rows, int depth, const Value& value, Factor (*make)(float) = MakeFactor) {
    FactorMatrix matrix(rows, depth);
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < depth; ++k) matrix.Row(r)[k] = make(value(r, k));
    }
    return matrix;
  }

  int rows() const { return rows_; }
  int depth() const { return depth_; }
  std::span<Factor> Row(int r) { return {&factors_[static_cast<size_t>(r) * depth_], static_cast<size_t>(depth_)}; }
  std::span<const Factor> Row(int r) const {
    return {&factors_[static_cast<size_t>(r) * depth_], static_cast<size_t>(depth_)};
  }

 private:
  int rows_;
  int depth_;
  std::vector<Factor> factors_;
};

// One row of a product: sums[n] = Chain(sums[n], a, b.Row(n)) for all n.
void ChainRow(std::span<const Factor> a, const FactorMatrix& b, std::span<float> sums, int group = kBf16Group);

// Where the even positions and then the odd ones of a block of 16 are: the order in which some kernels feed tf32 steps.
constexpr int EvenThenOdd(int i) {
  return i < 8 ? 2 * i : 2 * (i - 8) + 1;
}

}  // namespace lockstep::oracle

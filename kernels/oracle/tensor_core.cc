#include "kernels/oracle/tensor_core.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace lockstep::oracle {
namespace {

constexpr int kFractionBits = 25;
constexpr int kMinExponent = -126;

// value / 2^shift, toward zero.
int64_t Truncated(int64_t value, int shift) {
  const int64_t sign = value >> 63;
  const int64_t magnitude = (value ^ sign) - sign;
  return ((magnitude >> std::min(shift, 63)) ^ sign) - sign;
}

// sum * 2^exponent, toward zero.
float RoundTowardZero(int64_t sum, int exponent) {
  if (sum == 0) return 0.0f;
  const uint32_t sign = sum < 0 ? 0x80000000u : 0u;
  uint64_t magnitude = sum < 0 ? -static_cast<uint64_t>(sum) : static_cast<uint64_t>(sum);
  int leading = 63 - std::countl_zero(magnitude) + exponent;
  if (leading > 127) return std::bit_cast<float>(sign | 0x7F800000u);
  const int unit = std::max(leading, kMinExponent) - 23;  // exponent of the result's last bit
  magnitude = unit >= exponent ? magnitude >> std::min(unit - exponent, 63) : magnitude << (exponent - unit);
  // A normal number's hidden bit adds one to the exponent field, a subnormal has none.
  const uint32_t field = static_cast<uint32_t>(unit + 23 - kMinExponent);
  return std::bit_cast<float>(sign | ((field << 23) + static_cast<uint32_t>(magnitude)));
}

// With an infinity or a NaN among the factors or in the accumulator.
float SpecialStep(const Factor& accumulator, const Factor* a, const Factor* b, int count) {
  const float nan = std::bit_cast<float>(0x7FFFFFFFu);
  int sign = 0;  // of the infinities so far
  auto add_infinity = [&](int its_sign) {
    const bool agrees = sign == 0 || sign == its_sign;
    sign = its_sign;
    return agrees;
  };
  if (accumulator.exponent == Factor::kSpecialExponent) {
    if (accumulator.significand == 0) return nan;
    add_infinity(accumulator.significand);
  }
  for (int i = 0; i < count; ++i) {
    if (a[i].exponent != Factor::kSpecialExponent && b[i].exponent != Factor::kSpecialExponent) continue;
    // A NaN's significand is 0, as is that of a zero, which makes NaN of an infinity.
    if (a[i].significand == 0 || b[i].significand == 0) return nan;
    if (!add_infinity((a[i].significand < 0) == (b[i].significand < 0) ? 1 : -1)) return nan;
  }
  return sign < 0 ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
}

inline float Step(float accumulator, const Factor* a, const Factor* b, int count) {
  const Factor start = MakeFactor(accumulator);
  int top = start.exponent;
  for (int i = 0; i < count; ++i) top = std::max(top, a[i].exponent + b[i].exponent);
  if (top >= Factor::kSpecialExponent / 2) return SpecialStep(start, a, b, count);
  int64_t sum = Truncated(int64_t{start.significand} << (kFractionBits - 23), top - start.exponent);
  for (int i = 0; i < count; ++i) {
    sum += Truncated(int64_t{a[i].significand} * b[i].significand,
                     2 * 23 - kFractionBits + top - a[i].exponent - b[i].exponent);
  }
  return RoundTowardZero(sum, top - kFractionBits);
}

}  // namespace

Factor MakeFactor(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int32_t fraction = static_cast<int32_t>(bits & 0x7FFFFFu);
  const int32_t field = static_cast<int32_t>((bits >> 23) & 0xFFu);
  const int32_t sign = static_cast<int32_t>(bits) < 0 ? -1 : 1;
  if (field == 0xFF) return {fraction != 0 ? 0 : sign, Factor::kSpecialExponent};
  if (field == 0) return {sign * fraction, fraction != 0 ? kMinExponent : Factor::kZeroExponent};
  return {sign * (fraction | 0x800000), field - 127};
}

Factor MakeTf32Factor(float value) {
  return MakeFactor(std::bit_cast<float>(std::bit_cast<uint32_t>(value) & ~0x1FFFu));
}

float FusedStep(float accumulator, std::span<const Factor> a, std::span<const Factor> b) {
  return Step(accumulator, a.data(), b.data(), static_cast<int>(a.size()));
}

float Chain(float accumulator, std::span<const Factor> a, std::span<const Factor> b, int group) {
  const int depth = static_cast<int>(a.size());
  int k = 0;
  if (group == kBf16Group) {
    for (; k + kBf16Group <= depth; k += kBf16Group) accumulator = Step(accumulator, &a[k], &b[k], kBf16Group);
  }
  for (; k < depth; k += group) accumulator = Step(accumulator, &a[k], &b[k], std::min(group, depth - k));
  return accumulator;
}

void ChainRow(std::span<const Factor> a, const FactorMatrix& b, std::span<float> sums, int group) {
  for (int n = 0; n < b.rows(); ++n) sums[n] = Chain(sums[n], a, b.Row(n), group);
}

}  // namespace lockstep::oracle

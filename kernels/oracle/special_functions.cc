#include "kernels/oracle/special_functions.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/oracle/special_function_tables.h"

namespace lockstep::oracle {
namespace {

constexpr uint32_t kHiddenBit = 1u << 23;
constexpr uint32_t kFractionMask = kHiddenBit - 1;
constexpr uint32_t kNan = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;

struct Fields {
  bool negative;
  uint32_t exponent;  // biased
  uint32_t fraction;
};

Fields Split(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {(bits >> 31) != 0, (bits >> 23) & 0xFFu, bits & kFractionMask};
}

// significand in [2^23, 2^24]; a result below the normal range becomes zero.
float Assemble(bool negative, int exponent, uint32_t significand) {
  uint32_t bits = static_cast<uint32_t>(negative) << 31;
  if (significand == 2 * kHiddenBit) {
    significand = kHiddenBit;
    ++exponent;
  }
  if (exponent >= 255) {
    bits |= kInfinity;
  } else if (exponent > 0) {
    bits |= static_cast<uint32_t>(exponent) << 23 | (significand & kFractionMask);
  }
  return std::bit_cast<float>(bits);
}

float FromBits(bool negative, uint32_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(negative) << 31 | bits);
}

// x * x / 2^19 for 17-bit x, by a multiplier without the low columns of its partial products.
uint32_t TruncatedSquare(uint32_t x) {
  uint32_t sum = 0;
  for (int i = 0; i < 17; ++i) {
    if ((x >> i) & 1u) sum += x >> (18 - i);
  }
  return sum >> 1;
}

// The unit's rounding constants: not a half, because they also centre the truncation errors.
constexpr int64_t kExp2Bias = 0x77E2;
constexpr int64_t kReciprocalBias = 0x47E7;
constexpr int64_t kRsqrtBias = 0x7FFF;
constexpr int64_t kSqrtBias = 0x7FFF;

}  // namespace

float Exp2Approx(float x) {
  const Fields f = Split(x);
  if (f.exponent == 0xFF && f.fraction != 0) return std::bit_cast<float>(kNan);
  if (f.exponent >= 127 + 7) return f.negative ? 0.0f : std::numeric_limits<float>::infinity();
  // |x| in fixed point with 23 fractional bits, cut off, not rounded. A negative value is its ones' complement, which
  // is one unit below; an exact integer is itself.
  uint32_t fixed = 0;
  if (f.exponent != 0) {
    const uint32_t significand = kHiddenBit | f.fraction;
    const int shift = static_cast<int>(f.exponent) - 127;
    fixed = shift >= 0 ? significand << shift : shift > -24 ? significand >> -shift : 0;
  }
  int whole = static_cast<int>(fixed >> 23);
  uint32_t fraction = fixed & kFractionMask;
  if (f.negative) {
    whole = fraction != 0 ? -whole - 1 : -whole;
    fraction = fraction != 0 ? ~fraction & kFractionMask : 0;
  }
  const Slice& slice = kExp2Slices[fraction >> 17];
  const uint32_t rest = fraction & 0x1FFFFu;
  const int64_t sum = (int64_t{slice.value} << 13) + int64_t{slice.slope} * rest +
                      int64_t{slice.curvature} * TruncatedSquare(rest) + kExp2Bias;
  return Assemble(false, whole + 127, static_cast<uint32_t>(sum >> 15));
}

float ReciprocalApprox(float x) {
  const Fields f = Split(x);
  if (f.exponent == 0) return FromBits(f.negative, kInfinity);
  if (f.exponent == 0xFF) return f.fraction != 0 ? std::bit_cast<float>(kNan) : FromBits(f.negative, 0);
  const Slice& slice = kReciprocalSlices[f.fraction >> 16];
  const uint32_t rest = f.fraction & 0xFFFFu;
  const int64_t sum = (int64_t{slice.value} << 13) + int64_t{slice.slope} * rest +
                      int64_t{slice.curvature} * TruncatedSquare(rest << 1) + kReciprocalBias;
  return Assemble(f.negative, 2 * 127 - static_cast<int>(f.exponent) - 1, static_cast<uint32_t>(sum >> 15));
}

float RsqrtApprox(float x) {
  const Fields f = Split(x);
  if (f.exponent == 0) return FromBits(f.negative, kInfinity);
  if (f.exponent == 0xFF && f.fraction != 0) return std::bit_cast<float>(kNan);
  if (f.negative) return std::bit_cast<float>(kNan);
  if (f.exponent == 0xFF) return 0.0f;
  const int unbiased = static_cast<int>(f.exponent) - 127;
  const int half = unbiased >> 1;
  const uint32_t fraction = f.fraction | static_cast<uint32_t>(unbiased & 1) << 23;
  if (fraction == 0) return Assemble(false, 127 - half, kHiddenBit);
  const Slice& slice = kRsqrtSlices[fraction >> 17];
  const uint32_t rest = fraction & 0x1FFFFu;
  const int64_t sum = (int64_t{slice.value} << 14) + int64_t{slice.slope} * rest +
                      int64_t{slice.curvature} * TruncatedSquare(rest) * 4 + kRsqrtBias;
  return Assemble(false, 127 - half - 1, static_cast<uint32_t>(sum >> 16));
}

float SqrtApprox(float x) {
  const Fields f = Split(x);
  if (f.exponent == 0) return FromBits(f.negative, 0);
  if (f.exponent == 0xFF && f.fraction != 0) return std::bit_cast<float>(kNan);
  if (f.negative) return std::bit_cast<float>(kNan);
  if (f.exponent == 0xFF) return x;
  const int unbiased = static_cast<int>(f.exponent) - 127;
  const uint32_t fraction = f.fraction | static_cast<uint32_t>(unbiased & 1) << 23;
  const Slice& slice = kSqrtSlices[fraction >> 17];
  const uint32_t rest = fraction & 0x1FFFFu;
  const int64_t sum = (int64_t{slice.value} << 15) + int64_t{slice.slope} * rest +
                      int64_t{slice.curvature} * TruncatedSquare(rest) + kSqrtBias;
  return Assemble(false, 127 + (unbiased >> 1), static_cast<uint32_t>(sum >> 17));
}

float DivFull(float numerator, float denominator) {
  if (std::abs(denominator) > 0x1p126f) {
    numerator *= 0.25f;
    denominator *= 0.25f;
  }
  if (!(std::abs(denominator) >= 0x1p-126f)) {
    numerator *= 0x1p24f;
    denominator *= 0x1p24f;
  }
  return numerator * ReciprocalApprox(denominator);
}

float Exp(float x) {
  // round(x * log2(e)) kept within the exponent's range: saturated to [0, 1] as a fraction of 252.
  float turn = std::fma(x, std::bit_cast<float>(0x3BBB989Du), 0.5f);
  turn = turn > 0.0f ? std::fmin(turn, 1.0f) : 0.0f;
  // Rounded down to an integer by adding 1.5 * 2^23 + 1: the sum is exact in fp64.
  const float shifted = static_cast<float>(std::floor(static_cast<double>(turn) * 252.0 + 12582913.0));
  const float whole = shifted - 12582913.0f - 126.0f;
  float rest = std::fma(x, std::bit_cast<float>(0x3FB8AA3Bu), -whole);
  rest = std::fma(x, std::bit_cast<float>(0x32A57060u), rest);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23) * Exp2Approx(rest);
}

float Log(float x) {
  float exponent = 0.0f;
  if (!(x >= 0x1p-126f)) {
    x *= 0x1p23f;
    exponent = -23.0f;
  }
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (bits >= kInfinity) {
    if (x == 0.0f) return -std::numeric_limits<float>::infinity();
    return bits == kInfinity ? x : std::bit_cast<float>(kNan);
  }
  if (x == 0.0f) return -std::numeric_limits<float>::infinity();
  // x = 2^e * m with m in [2/3, 4/3).
  const uint32_t e = (bits - 0x3F2AAAABu) & 0xFF800000u;
  const float m = std::bit_cast<float>(bits - e) - 1.0f;
  exponent = std::fma(static_cast<float>(static_cast<int32_t>(e)), 0x1p-23f, exponent);
  float p = std::fma(m, -std::bit_cast<float>(0x3E055027u), 0.14084610342979431152f);
  p = std::fma(m, p, -0.12148627638816833496f);
  p = std::fma(m, p, 0.13980610668659210205f);
  p = std::fma(m, p, -0.16684235632419586182f);
  p = std::fma(m, p, 0.20012299716472625732f);
  p = std::fma(m, p, -0.24999669194221496582f);
  p = std::fma(m, p, 0.33333182334899902344f);
  p = std::fma(m, p, -0.5f);
  p = std::fma(m, m * p, m);
  return std::fma(exponent, 0.69314718246459960938f, p);
}

float Log1p(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  // 1 + x rounded toward zero: only its exponent matters.
  float sum = 1.0f + x;
  if (std::abs(static_cast<double>(sum)) > std::abs(1.0 + static_cast<double>(x))) sum = std::nextafter(sum, 0.0f);
  const uint32_t e = (std::bit_cast<uint32_t>(sum) - 0x3F400000u) & 0xFF800000u;
  const float scale = std::bit_cast<float>(0x40800000u - e);
  const float m = std::bit_cast<float>(bits - e) + std::fma(scale, 0.25f, -1.0f);
  const float exponent = static_cast<float>(static_cast<int32_t>(e)) * 0x1p-23f;
  float p = std::fma(m, -std::bit_cast<float>(0x3D39BF78u), 0.10546888411045074463f);
  p = std::fma(m, p, -0.13229703903198242188f);
  p = std::fma(m, p, 0.14491446316242218018f);
  p = std::fma(m, p, -0.16641564667224884033f);
  p = std::fma(m, p, 0.19988867640495300293f);
  p = std::fma(m, p, -0.25000196695327758789f);
  p = std::fma(m, p, 0.33333510160446166992f);
  p = std::fma(m, p, -0.5f);
  p = std::fma(m, m * p, m);
  const float result = std::fma(exponent, 0.69314718246459960938f, p);
  if (bits < kInfinity) return result;
  if (x == 0.0f) return -0.0f;
  if (bits == kInfinity) return x;
  if (bits < 0x80000000u || bits > 0xBF800000u) return std::bit_cast<float>(kNan);  // NaN, or below -1
  return result;
}

float Rsqrt(float x) {
  if (std::abs(x) >= 0x1p-126f) return RsqrtApprox(x);
  return RsqrtApprox(x * 0x1p24f) * 0x1p12f;
}

}  // namespace lockstep::oracle

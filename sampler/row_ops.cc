#include "sampler/row_ops.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "sampler/mass.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "sampler/row_ops.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd_util-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// Passes are unrolled by this many logits: one test for "anything here?" per group keeps rare hits cheap.
constexpr int64_t kGroup = 64;

RowRange FindRangeVector(const float* row, int64_t size) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF largest = hn::Set(df, std::numeric_limits<float>::max());
  VF max0 = hn::Set(df, -std::numeric_limits<float>::infinity());
  VF max1 = max0;
  // A comparison with NaN is false, one with -inf true.
  auto valid0 = hn::Le(max0, largest);
  auto valid1 = valid0;
  int64_t i = 0;
  for (; i + 2 * lanes <= size; i += 2 * lanes) {
    const VF v0 = hn::LoadU(df, row + i);
    const VF v1 = hn::LoadU(df, row + i + lanes);
    valid0 = hn::And(valid0, hn::Le(v0, largest));
    valid1 = hn::And(valid1, hn::Le(v1, largest));
    max0 = hn::Max(max0, v0);
    max1 = hn::Max(max1, v1);
  }
  RowRange range{.max = hn::GetLane(hn::MaxOfLanes(df, hn::Max(max0, max1))),
                 .valid = hn::AllTrue(df, hn::And(valid0, valid1))};
  for (; i < size; ++i) {
    range.valid = range.valid && row[i] <= std::numeric_limits<float>::max();
    range.max = std::max(range.max, row[i]);
  }
  return range;
}

void DivideRowVector(const float* row, int64_t size, float divisor, float* out) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF d = hn::Set(df, divisor);
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) hn::StoreU(hn::Div(hn::LoadU(df, row + i), d), df, out + i);
  for (; i < size; ++i) out[i] = row[i] / divisor;
}

using DD = hn::Repartition<double, DF>;
using DFHalf = hn::Rebind<float, DD>;
using DM = hn::RebindToUnsigned<DD>;

// Sum of Mass over weights[0, count).
uint64_t SumMass(const float* weights, int64_t count) {
  const DD dd;
  const DM dm;
  const DFHalf dh;
  const int64_t lanes = static_cast<int64_t>(hn::MaxLanes(dd));
  const auto units = hn::Set(dd, kMassUnits);
  const auto magic = hn::Set(dd, kRoundingMagic);
  // The bit patterns are added with the magic number's own bits still in them; modulo 2^64 those come off at the end,
  // all at once.
  auto sum0 = hn::Zero(dm);
  auto sum1 = sum0;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto w0 = hn::PromoteTo(dd, hn::LoadU(dh, weights + i));
    const auto w1 = hn::PromoteTo(dd, hn::LoadU(dh, weights + i + lanes));
    sum0 = hn::Add(sum0, hn::BitCast(dm, hn::Add(hn::Mul(w0, units), magic)));
    sum1 = hn::Add(sum1, hn::BitCast(dm, hn::Add(hn::Mul(w1, units), magic)));
  }
  HWY_ALIGN uint64_t lane[HWY_MAX_BYTES / sizeof(uint64_t)];
  hn::Store(hn::Add(sum0, sum1), dm, lane);
  uint64_t sum = 0;
  for (int64_t l = 0; l < lanes; ++l) sum += lane[l];
  sum -= static_cast<uint64_t>(i) * std::bit_cast<uint64_t>(kRoundingMagic);
  for (; i < count; ++i) sum += Mass(weights[i]);
  return sum;
}

// e^x for x <= 0; 0 below -87, short of fp32's subnormals, which are slow and have no mass.
HWY_INLINE VF Weight(VF x) {
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(DF(), -87.0f)), Exp(x));
}

uint64_t WeighRowVector(const float* row, int64_t size, float max, float* weights, uint64_t* block_mass) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF m = hn::Set(df, max);
  uint64_t total = 0;
  for (int64_t begin = 0; begin < size; begin += kMassBlock) {
    const int64_t end = std::min(size, begin + kMassBlock);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) hn::StoreU(Weight(hn::Sub(hn::LoadU(df, row + i), m)), df, weights + i);
    if (i < end) StoreFirst(Weight(hn::Sub(LoadFirst(row + i, end - i), m)), weights + i, end - i);
    const uint64_t mass = SumMass(weights + begin, end - begin);
    block_mass[begin / kMassBlock] = mass;
    total += mass;
  }
  return total;
}

int64_t FindFirstVector(const float* row, int64_t size, float value) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF v = hn::Set(df, value);
  int64_t i = 0;
  while (i + lanes <= size && hn::AllFalse(df, hn::Eq(hn::LoadU(df, row + i), v))) i += lanes;
  while (i < size && row[i] != value) ++i;
  return i;
}

int64_t AppendKeysVector(const float* row, int64_t size, int64_t begin, float above, size_t capacity,
                         std::vector<TokenKey>& keys) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF low = hn::Set(df, above);
  int64_t i = begin;
  while (i < size && keys.size() < capacity) {
    if (i + kGroup <= size) {
      auto any = hn::Gt(low, low);  // none
      for (int64_t j = i; j < i + kGroup; j += lanes) {
        any = hn::Or(any, hn::Gt(hn::LoadU(df, row + j), low));
      }
      if (hn::AllFalse(df, any)) {
        i += kGroup;
        continue;
      }
    }
    for (const int64_t end = std::min(size, i + kGroup); i < end && keys.size() < capacity; ++i) {
      if (row[i] > above) keys.push_back(MakeTokenKey(row[i], static_cast<int32_t>(i)));
    }
  }
  return i;
}

HWY_INLINE hn::Vec<DI> BinOf(VF v, VF max) {
  const DF df;
  return hn::ConvertTo(DI(), hn::Min(hn::Mul(hn::Sub(max, v), hn::Set(df, 8.0f)), hn::Set(df, kBins - 1.0f)));
}

void BinMassesVector(const float* row, int64_t size, float max, const float* weights, uint64_t* bin_mass) {
  const DF df;
  const DI di;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF m = hn::Set(df, max);
  // Neighbours often share a bin; adding to copies in turn keeps the additions independent.
  constexpr int64_t kCopies = 4;
  uint64_t mass[kBins * kCopies] = {};
  HWY_ALIGN int32_t bins[kLanes];
  for (int64_t i = 0; i < size; i += lanes) {
    const int64_t count = std::min(lanes, size - i);
    const VF v = count == lanes ? hn::LoadU(df, row + i) : LoadFirst(row + i, count);
    hn::Store(BinOf(v, m), di, bins);
    for (int64_t j = 0; j < count; ++j) mass[bins[j] * kCopies + j % kCopies] += Mass(weights[i + j]);
  }
  for (int64_t b = 0; b < kBins; ++b) {
    bin_mass[b] = 0;
    for (int64_t c = 0; c < kCopies; ++c) bin_mass[b] += mass[b * kCopies + c];
  }
}

void AppendBinVector(const float* row, int64_t size, float max, int bin, std::vector<TokenKey>& keys) {
  const DF df;
  const DI di;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const VF m = hn::Set(df, max);
  const auto wanted = hn::Set(di, bin);
  HWY_ALIGN int32_t bins[kLanes];
  for (int64_t i = 0; i < size; i += lanes) {
    const int64_t count = std::min(lanes, size - i);
    const auto found = BinOf(count == lanes ? hn::LoadU(df, row + i) : LoadFirst(row + i, count), m);
    if (hn::AllFalse(di, hn::Eq(found, wanted))) continue;
    hn::Store(found, di, bins);
    for (int64_t j = 0; j < count; ++j) {
      if (bins[j] == bin) keys.push_back(MakeTokenKey(row[i + j], static_cast<int32_t>(i + j)));
    }
  }
}

void DropBelowVector(float* row, int64_t size, float logit) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(kLanes);
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  const VF limit = hn::Set(df, logit);
  const VF dropped = hn::Set(df, minus_infinity);
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    const VF v = hn::LoadU(df, row + i);
    hn::StoreU(hn::IfThenElse(hn::Lt(v, limit), dropped, v), df, row + i);
  }
  for (; i < size; ++i) {
    if (row[i] < logit) row[i] = minus_infinity;
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {

HWY_EXPORT(FindRangeVector);
HWY_EXPORT(DivideRowVector);
HWY_EXPORT(WeighRowVector);
HWY_EXPORT(FindFirstVector);
HWY_EXPORT(AppendKeysVector);
HWY_EXPORT(BinMassesVector);
HWY_EXPORT(AppendBinVector);
HWY_EXPORT(DropBelowVector);

namespace {
int64_t Size(std::span<const float> row) {
  return static_cast<int64_t>(row.size());
}
}  // namespace

RowRange FindRange(std::span<const float> row) {
  return HWY_DYNAMIC_DISPATCH(FindRangeVector)(row.data(), Size(row));
}

void DivideRow(std::span<const float> row, float divisor, float* out) {
  HWY_DYNAMIC_DISPATCH(DivideRowVector)(row.data(), Size(row), divisor, out);
}

uint64_t WeighRow(std::span<const float> row, float max, float* weights, uint64_t* block_mass) {
  return HWY_DYNAMIC_DISPATCH(WeighRowVector)(row.data(), Size(row), max, weights, block_mass);
}

int64_t FindFirst(std::span<const float> row, float value) {
  return HWY_DYNAMIC_DISPATCH(FindFirstVector)(row.data(), Size(row), value);
}

int64_t AppendKeys(std::span<const float> row, int64_t begin, float above, size_t capacity,
                   std::vector<TokenKey>& keys) {
  return HWY_DYNAMIC_DISPATCH(AppendKeysVector)(row.data(), Size(row), begin, above, capacity, keys);
}

void BinMasses(std::span<const float> row, float max, const float* weights, std::array<uint64_t, kBins>& bin_mass) {
  HWY_DYNAMIC_DISPATCH(BinMassesVector)(row.data(), Size(row), max, weights, bin_mass.data());
}

void AppendBin(std::span<const float> row, float max, int bin, std::vector<TokenKey>& keys) {
  HWY_DYNAMIC_DISPATCH(AppendBinVector)(row.data(), Size(row), max, bin, keys);
}

void DropBelow(std::span<float> row, float logit) {
  HWY_DYNAMIC_DISPATCH(DropBelowVector)(row.data(), static_cast<int64_t>(row.size()), logit);
}

}  // namespace lockstep
#endif  // HWY_ONCE

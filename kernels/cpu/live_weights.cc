#include "kernels/cpu/live_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/digest_math.h"
#include "kernels/host_values.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

// Values of a linear weight: [first, first + count) of its tensor, row after row.
struct Run {
  const CpuWeightPlace& place;
  int64_t first = 0;
  int64_t count = 0;

  int64_t row_of(int64_t value) const { return value / place.linear->in_features(); }
  int64_t first_row() const { return row_of(first); }
  int64_t last_row() const { return row_of(first + count - 1); }

  // Calls visit(feature, begin, end, value): columns [begin, end) of the row are the run's from `value` on.
  template <class Visit>
  void Row(int64_t row, Visit visit) const {
    const int64_t width = place.linear->in_features();
    const int64_t begin = std::max(first, row * width), end = std::min(first + count, (row + 1) * width);
    visit(place.first_row + row, begin - row * width, end - row * width, begin - first);
  }
};

Run RunOf(const CpuWeightPlace& place, int64_t offset, size_t bytes) {
  const int64_t size = DTypeBytes(place.dtype), at = offset - place.offset;
  LOCKSTEP_CHECK(at % size == 0 && static_cast<int64_t>(bytes) % size == 0, "{} bytes at {} of values of {} bytes",
                 bytes, at, size);
  return {place, at / size, static_cast<int64_t>(bytes) / size};
}

}  // namespace

const CpuWeightPlace& CpuLiveWeights::Find(int64_t offset, int64_t bytes) const {
  auto after = std::upper_bound(places_.begin(), places_.end(), offset,
                                [](int64_t at, const CpuWeightPlace& place) { return at < place.offset; });
  LOCKSTEP_CHECK(after != places_.begin() && offset + bytes <= std::prev(after)->offset + std::prev(after)->bytes,
                 "{} bytes at {} are in no tensor", bytes, offset);
  return *std::prev(after);
}

absl::Status CpuLiveWeights::Write(int64_t offset, std::span<const std::byte> data) {
  if (data.empty()) return absl::OkStatus();
  const CpuWeightPlace& place = Find(offset, static_cast<int64_t>(data.size()));
  if (place.linear == nullptr) {
    std::memcpy(place.memory + (offset - place.offset), data.data(), data.size());
    return absl::OkStatus();
  }
  const Run run = RunOf(place, offset, data.size());
  // By panels of the weight: no two threads write into one.
  const int64_t first_panel = (place.first_row + run.first_row()) / kPanelFeatures;
  const int64_t panels = (place.first_row + run.last_row()) / kPanelFeatures + 1 - first_panel;
  context_.threads.ParallelFor(panels, 1, [&](int64_t begin, int64_t end, int thread) {
    float* values = context_.scratch.Floats(thread, place.linear->in_features());
    const int64_t low = (first_panel + begin) * kPanelFeatures - place.first_row;
    const int64_t high = (first_panel + end) * kPanelFeatures - place.first_row;
    for (int64_t row = std::max(low, run.first_row()); row < high && row <= run.last_row(); ++row) {
      run.Row(row, [&](int64_t feature, int64_t from, int64_t to, int64_t value) {
        ConvertValues(data.data() + value * DTypeBytes(place.dtype), place.dtype, to - from, DType::kF32,
                      reinterpret_cast<std::byte*>(values));
        WriteFeature(*place.linear, feature, from, to, values);
      });
    }
  });
  return absl::OkStatus();
}

absl::Status CpuLiveWeights::Read(int64_t offset, std::span<std::byte> to) {
  if (to.empty()) return absl::OkStatus();
  const CpuWeightPlace& place = Find(offset, static_cast<int64_t>(to.size()));
  if (place.linear == nullptr) {
    std::memcpy(to.data(), place.memory + (offset - place.offset), to.size());
    return absl::OkStatus();
  }
  const Run run = RunOf(place, offset, to.size());
  std::vector<float> values(place.linear->in_features());
  for (int64_t row = run.first_row(); row <= run.last_row(); ++row) {
    run.Row(row, [&](int64_t feature, int64_t begin, int64_t end, int64_t value) {
      ReadFeature(*place.linear, feature, begin, end, values.data());
      ConvertValues(reinterpret_cast<const std::byte*>(values.data()), DType::kF32, end - begin, place.dtype,
                    to.data() + value * DTypeBytes(place.dtype));
    });
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> CpuLiveWeights::SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) {
  constexpr int64_t kSlice = int64_t{1} << 20;  // whole words and values
  std::atomic<uint64_t> sum = 0;
  context_.threads.ParallelFor((bytes + kSlice - 1) / kSlice, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<std::byte> values;
    for (int64_t at = begin * kSlice; at < std::min(end * kSlice, bytes); at += kSlice) {
      values.resize(std::min(kSlice, bytes - at));
      LOCKSTEP_CHECK(Read(offset + at, values).ok(), "{} bytes at {}", values.size(), offset + at);
      sum += DigestSum(values, first_word + static_cast<uint64_t>(at) / 8);
    }
  });
  return sum;
}

}  // namespace lockstep

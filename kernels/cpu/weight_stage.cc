#include "kernels/cpu/weight_stage.h"

#include <algorithm>

#include "kernels/digest_math.h"
#include "kernels/host_values.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr int64_t kBlock = int64_t{1} << 16;  // values at a time; a multiple of 4

}  // namespace

absl::StatusOr<std::unique_ptr<CpuWeightInbox>> CpuWeightInbox::Create(int64_t buffer_bytes, int64_t tallies) {
  LOCKSTEP_ASSIGN_OR_RETURN(Arena buffers, Arena::Map(2 * buffer_bytes));
  return std::unique_ptr<CpuWeightInbox>(new CpuWeightInbox(std::move(buffers), buffer_bytes, tallies));
}

absl::Status CpuWeightInbox::Reset() {
  std::fill(tallies_.begin(), tallies_.end(), ValueTally());
  return absl::OkStatus();
}

absl::Status CpuWeightInbox::Store(const InboxValues& values, WeightStage& stage) {
  const int64_t sent_bytes = DTypeBytes(values.sent), held_bytes = DTypeBytes(values.held);
  LOCKSTEP_CHECK(values.to >= 0 && values.to + values.count * DTypeBytes(values.stored) <= stage.bytes() &&
                     values.sent_index % 4 == 0 && values.held_index % 4 == 0,
                 "{} values at {} of {} bytes", values.count, values.to, stage.bytes());
  const int64_t stored_bytes = DTypeBytes(values.stored);
  std::vector<std::byte> held(std::min(values.count, kBlock) * held_bytes);
  std::byte* const address = stage.Address(values.to, values.count * stored_bytes);
  std::vector<std::byte> stored(address != nullptr ? 0 : std::min(values.count, kBlock) * stored_bytes);
  for (int64_t done = 0; done < values.count; done += kBlock) {
    const int64_t count = std::min(kBlock, values.count - done);
    const std::byte* from = values.from + done * sent_bytes;
    ConvertValues(from, values.sent, count, values.held, held.data());
    std::byte* const to = address != nullptr ? address + done * stored_bytes : stored.data();
    ConvertValues(held.data(), values.held, count, values.stored, to);
    if (address == nullptr) {
      LOCKSTEP_RETURN_IF_ERROR(stage.Write(values.to + done * stored_bytes, std::span(to, count * stored_bytes)));
    }
    if (values.tally < 0) continue;
    ValueTally& tally = tallies_[values.tally];
    tally.sent_sum +=
        DigestSum({from, static_cast<size_t>(count * sent_bytes)}, (values.sent_index + done) * sent_bytes / 8);
    tally.held_sum +=
        DigestSum({held.data(), static_cast<size_t>(count * held_bytes)}, (values.held_index + done) * held_bytes / 8);
    tally.non_finite += static_cast<uint64_t>(CountNonFinite(from, values.sent, count));
  }
  return absl::OkStatus();
}

}  // namespace lockstep

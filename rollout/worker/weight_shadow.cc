#include "rollout/worker/weight_shadow.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "weights_sync/digest.h"

namespace lockstep {
namespace {

constexpr int64_t kPieceBytes = int64_t{64} << 20;  // moved between two looks at `cancelled`

// Calls visit(first byte, bytes) for pieces of the tensor.
template <class Visit>
absl::Status ForEachPiece(const WeightShadow::Tensor& tensor, const std::atomic<bool>& cancelled,
                          std::atomic<int64_t>& done, Visit visit) {
  for (int64_t at = 0; at < tensor.bytes; at += kPieceBytes) {
    if (cancelled) return absl::CancelledError("this worker is stopping");
    const int64_t bytes = std::min(kPieceBytes, tensor.bytes - at);
    LOCKSTEP_RETURN_IF_ERROR(visit(at, bytes));
    done += bytes;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<WeightShadow> WeightShadow::Create(LiveWeights* live, std::vector<Tensor> tensors) {
  LOCKSTEP_ASSIGN_OR_RETURN(Arena arena, Arena::Map(live->bytes()));
  return WeightShadow(live, std::move(tensors), std::move(arena));
}

WeightShadow::WeightShadow(WeightShadow&& other) noexcept
    : live_(other.live_),
      tensors_(std::move(other.tensors_)),
      arena_(std::move(other.arena_)),
      digests_(std::move(other.digests_)),
      done_(other.done_.load()),
      total_(other.total_.load()) {}

void WeightShadow::Begin(std::span<const size_t> tensors, int64_t passes) {
  int64_t bytes = 0;
  for (const size_t t : tensors) bytes += tensors_[t].bytes;
  done_ = 0;
  total_ = passes * bytes;
}

absl::Status WeightShadow::Write(std::span<const size_t> tensors, const std::atomic<bool>& cancelled) {
  Begin(tensors, 1);
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.shadow.before"));
  for (const size_t t : tensors) {
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.shadow.slot"));
    const Tensor& tensor = tensors_[t];
    Digester digester;
    const absl::Status copied = ForEachPiece(tensor, cancelled, done_, [&](int64_t at, int64_t bytes) -> absl::Status {
      const std::span<std::byte> to(arena_.data() + tensor.offset + at, bytes);
      LOCKSTEP_RETURN_IF_ERROR(live_.Read(tensor.offset + at, to));
      digester.Add(to);
      return absl::OkStatus();
    });
    LOCKSTEP_RETURN_IF_ERROR(copied);
    digests_[t] = digester.Finish();
  }
  return FailpointStatus("weights.shadow.after");
}

absl::Status WeightShadow::Restore(std::span<const size_t> tensors, const std::atomic<bool>& cancelled) {
  Begin(tensors, 2);
  LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.restore.before"));
  for (const size_t t : tensors) {
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.restore.slot"));
    const Tensor& tensor = tensors_[t];
    LOCKSTEP_RETURN_IF_ERROR(ForEachPiece(tensor, cancelled, done_, [&](int64_t at, int64_t bytes) {
      return live_.Write(tensor.offset + at, {arena_.data() + tensor.offset + at, static_cast<size_t>(bytes)});
    }));
  }
  LOCKSTEP_RETURN_IF_ERROR(live_.Finish());
  std::vector<std::byte> read;
  for (const size_t t : tensors) {
    const Tensor& tensor = tensors_[t];
    Digester digester;
    const absl::Status back = ForEachPiece(tensor, cancelled, done_, [&](int64_t at, int64_t bytes) -> absl::Status {
      read.resize(bytes);
      LOCKSTEP_RETURN_IF_ERROR(live_.Read(tensor.offset + at, read));
      digester.Add(read);
      return absl::OkStatus();
    });
    LOCKSTEP_RETURN_IF_ERROR(back);
    if (digester.Finish() != digests_[t]) {
      return absl::DataLossError(absl::StrCat(tensor.name, ": digest ", absl::Hex(digester.Finish(), absl::kZeroPad16),
                                              " after restoring, want ", absl::Hex(digests_[t], absl::kZeroPad16)));
    }
  }
  return FailpointStatus("weights.restore.after");
}

}  // namespace lockstep

#include "rollout/worker/weight_shadow.h"

#include <algorithm>
#include <deque>
#include <future>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/digest_math.h"
#include "rollout/base/failpoint.h"
#include "rollout/base/status.h"
#include "weights_sync/digest.h"

namespace lockstep {
namespace {

constexpr int64_t kPieceBytes = int64_t{16} << 20;  // moved between two looks at `cancelled`; whole words of digests
constexpr size_t kDigestThreads = 8;

// Digests of tensors whose pieces come one after the other, by threads of their own: one takes some 2 GB a second, less
// than a device gives.
class TensorDigests {
 public:
  explicit TensorDigests(size_t tensors) : sums_(tensors) {}

  // `piece` begins at byte `at`, and stays where it is.
  void Add(size_t tensor, int64_t at, std::span<const std::byte> piece) {
    if (under_way_.size() == kDigestThreads) TakeOldest();
    auto sum = [piece, at] { return DigestSum(piece, static_cast<uint64_t>(at) / 8); };
    under_way_.push_back({tensor, std::async(std::launch::async, std::move(sum))});
  }
  // Of a tensor of which every piece was added; waits for all that is under way.
  uint64_t Finish(size_t tensor, int64_t bytes) {
    while (!under_way_.empty()) TakeOldest();
    return DigestOfSum(sums_[tensor], static_cast<uint64_t>(bytes));
  }

 private:
  struct Piece {
    size_t tensor;
    std::future<uint64_t> sum;
  };
  void TakeOldest() {
    sums_[under_way_.front().tensor] += under_way_.front().sum.get();
    under_way_.pop_front();
  }

  std::vector<uint64_t> sums_;
  std::deque<Piece> under_way_;
};

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
  TensorDigests digests(tensors_.size());
  for (const size_t t : tensors) {
    LOCKSTEP_RETURN_IF_ERROR(FailpointStatus("weights.shadow.slot"));
    const Tensor& tensor = tensors_[t];
    const absl::Status copied = ForEachPiece(tensor, cancelled, done_, [&](int64_t at, int64_t bytes) -> absl::Status {
      const std::span<std::byte> to(arena_.data() + tensor.offset + at, bytes);
      LOCKSTEP_RETURN_IF_ERROR(live_.Read(tensor.offset + at, to));
      digests.Add(t, at, to);
      return absl::OkStatus();
    });
    LOCKSTEP_RETURN_IF_ERROR(copied);
  }
  for (const size_t t : tensors) digests_[t] = digests.Finish(t, tensors_[t].bytes);
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
  for (const size_t t : tensors) {
    const Tensor& tensor = tensors_[t];
    uint64_t sum = 0;
    const absl::Status counted = ForEachPiece(tensor, cancelled, done_, [&](int64_t at, int64_t bytes) -> absl::Status {
      LOCKSTEP_ASSIGN_OR_RETURN(const uint64_t part,
                                live_.SumInUse(tensor.offset + at, bytes, static_cast<uint64_t>(at) / 8));
      sum += part;
      return absl::OkStatus();
    });
    LOCKSTEP_RETURN_IF_ERROR(counted);
    const uint64_t digest = DigestOfSum(sum, static_cast<uint64_t>(tensor.bytes));
    if (digest == digests_[t]) continue;
    return absl::DataLossError(absl::StrCat(tensors_[t].name, ": digest ", absl::Hex(digest, absl::kZeroPad16),
                                            " after restoring, want ", absl::Hex(digests_[t], absl::kZeroPad16)));
  }
  return FailpointStatus("weights.restore.after");
}

}  // namespace lockstep

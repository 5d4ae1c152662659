#include "tools/bench/kernel_recorder.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

constexpr size_t kBufferBytes = size_t{4} << 20;

// CUPTI's callbacks carry no argument of ours.
struct Recorded {
  absl::Mutex mutex;
  cupti::Api api ABSL_GUARDED_BY(mutex) = {};
  std::vector<KernelLaunch> launches ABSL_GUARDED_BY(mutex);
  size_t lost ABSL_GUARDED_BY(mutex) = 0;  // records without room or without times
};
Recorded& TheRecorded() {
  static Recorded* const recorded = new Recorded;  // CUPTI may call until the process ends
  return *recorded;
}

void OnBufferRequested(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(cupti::kBufferAlignment, kBufferBytes));
  *size = *buffer == nullptr ? 0 : kBufferBytes;
  *max_records = 0;  // as many as there is room for
}

void OnBufferCompleted(cupti::Context context, uint32_t stream, uint8_t* buffer, size_t, size_t valid_size) {
  Recorded& recorded = TheRecorded();
  const absl::MutexLock lock(&recorded.mutex);
  cupti::Activity* record = nullptr;
  while (recorded.api.cuptiActivityGetNextRecord(buffer, valid_size, &record) == cupti::kSuccess) {
    if (record->kind != cupti::kConcurrentKernel) continue;
    const auto& kernel = *reinterpret_cast<const cupti::KernelActivity*>(record);
    if (kernel.end == 0) {
      ++recorded.lost;
    } else {
      recorded.launches.push_back({kernel.name == nullptr ? "?" : kernel.name, kernel.start, kernel.end});
    }
  }
  size_t dropped = 0;
  recorded.api.cuptiActivityGetNumDroppedRecords(context, stream, &dropped);
  recorded.lost += dropped;
  std::free(buffer);
}

}  // namespace

absl::StatusOr<KernelRecorder> KernelRecorder::Start(const CuptiLibrary& library) {
  {
    Recorded& recorded = TheRecorded();
    const absl::MutexLock lock(&recorded.mutex);
    recorded.api = library.api;
    recorded.launches.clear();
    recorded.lost = 0;
  }
  LOCKSTEP_RETURN_IF_ERROR(
      library.ToStatus(library.api.cuptiActivityRegisterCallbacks(OnBufferRequested, OnBufferCompleted),
                       "cuptiActivityRegisterCallbacks"));
  LOCKSTEP_RETURN_IF_ERROR(
      library.ToStatus(library.api.cuptiActivityEnable(cupti::kConcurrentKernel), "cuptiActivityEnable"));
  return KernelRecorder(library);
}

absl::StatusOr<std::vector<KernelLaunch>> KernelRecorder::Take() {
  LOCKSTEP_RETURN_IF_ERROR(
      library_.ToStatus(library_.api.cuptiActivityFlushAll(cupti::kFlushForced), "cuptiActivityFlushAll"));
  Recorded& recorded = TheRecorded();
  const absl::MutexLock lock(&recorded.mutex);
  std::vector<KernelLaunch> launches = std::exchange(recorded.launches, {});
  const size_t lost = std::exchange(recorded.lost, 0);
  if (lost > 0)
    return absl::InternalError(absl::StrCat("CUPTI lost ", lost, " of ", lost + launches.size(), " records"));
  std::stable_sort(launches.begin(), launches.end(),
                   [](const KernelLaunch& a, const KernelLaunch& b) { return a.start < b.start; });
  return launches;
}

absl::Status KernelRecorder::Stop() {
  LOCKSTEP_RETURN_IF_ERROR(
      library_.ToStatus(library_.api.cuptiActivityDisable(cupti::kConcurrentKernel), "cuptiActivityDisable"));
  return Take().status();
}

}  // namespace lockstep

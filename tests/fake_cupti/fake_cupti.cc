// CUPTI's C ABI, as far as tools/bench/cupti_abi.h goes. Kernels are what a test says it launched, with
// fake_cupti_launch; records are longer than what is read of them, as the real ones are, and buffers are handed over on
// a thread of the library's own.
//
// FAKE_CUPTI_VERSION: what cuptiGetVersion gives, 130001 unless set.
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "tools/bench/cupti_abi.h"

using namespace lockstep::cupti;  // NOLINT: this file is the library

namespace {

constexpr Result kErrorUnknown = static_cast<Result>(999);

struct LongRecord {
  KernelActivity kernel;
  char rest[112];
};
constexpr size_t kRecordsABuffer = 3;

BufferRequested requested = nullptr;
BufferCompleted completed = nullptr;
bool enabled = false;
std::vector<LongRecord> launched;
std::vector<std::string*> names;  // kept for good: records point to them
size_t dropped_records = 0;

void HandOver() {
  for (size_t next = 0; next < launched.size();) {
    uint8_t* buffer = nullptr;
    size_t size = 0, limit = 0;
    requested(&buffer, &size, &limit);
    size_t count = 0;
    for (; next < launched.size() && count < kRecordsABuffer && (count + 1) * sizeof(LongRecord) <= size; ++count)
      reinterpret_cast<LongRecord*>(buffer)[count] = launched[next++];
    completed(nullptr, 0, buffer, size, count * sizeof(LongRecord));
  }
  launched.clear();
}

}  // namespace

#define FAKE_CUPTI_API extern "C" __attribute__((visibility("default")))

// The tests' own. Times in ns; recorded only while kernels are.
FAKE_CUPTI_API void fake_cupti_launch(const char* name, uint64_t start, uint64_t end) {
  if (!enabled) return;
  names.push_back(new std::string(name));
  LongRecord record = {};
  record.kernel = {.kind = kConcurrentKernel, .start = start, .end = end, .name = names.back()->c_str()};
  launched.push_back(record);
}
FAKE_CUPTI_API void fake_cupti_drop(size_t records) {
  dropped_records = records;
}

FAKE_CUPTI_API Result cuptiGetVersion(uint32_t* version) {
  const char* set = std::getenv("FAKE_CUPTI_VERSION");
  *version = set == nullptr ? 130001 : static_cast<uint32_t>(std::atoi(set));
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiGetResultString(Result, const char** text) {
  *text = "a fake error";
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityRegisterCallbacks(BufferRequested on_request, BufferCompleted on_completion) {
  requested = on_request;
  completed = on_completion;
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityEnable(ActivityKind kind) {
  if (requested == nullptr || kind != kConcurrentKernel) return kErrorUnknown;
  enabled = true;
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityDisable(ActivityKind) {
  if (!enabled) return kErrorUnknown;
  enabled = false;
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityFlushAll(uint32_t) {
  std::thread(HandOver).join();
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityGetNextRecord(uint8_t* buffer, size_t valid_size, Activity** record) {
  uint8_t* const next = *record == nullptr ? buffer : reinterpret_cast<uint8_t*>(*record) + sizeof(LongRecord);
  if (next >= buffer + valid_size) return kMaxLimitReached;
  *record = reinterpret_cast<Activity*>(next);
  return kSuccess;
}
FAKE_CUPTI_API Result cuptiActivityGetNumDroppedRecords(Context, uint32_t, size_t* dropped) {
  *dropped = dropped_records;
  dropped_records = 0;
  return kSuccess;
}

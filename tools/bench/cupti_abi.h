// The part of CUPTI's C ABI that is used here, declared by us: a build needs no cupti.h, and the library is found at
// run time (cupti_library.h). cupti_abi_test compares it with a real cupti.h where CMake finds one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep::cupti {

// CUDA 12.0's. Its kernel record begins as all later ones do; records are only read, through pointers that CUPTI gives.
inline constexpr uint32_t kMinVersion = 18;

enum Result : int { kSuccess = 0, kMaxLimitReached = 12 };
enum ActivityKind : int { kConcurrentKernel = 10 };
inline constexpr uint32_t kFlushForced = 1;

struct Activity {
  int kind;
};

// CUpti_ActivityKernel9 and later, as far as the name. Times: nanoseconds; 0: not known.
struct KernelActivity {
  int kind;
  uint8_t cache_config;
  uint8_t shared_memory_config;
  uint16_t registers_per_thread;
  int partitioned_cache_requested;
  int partitioned_cache_executed;
  uint64_t start;
  uint64_t end;
  uint64_t completed;
  uint32_t device_id;
  uint32_t context_id;
  uint32_t stream_id;
  int32_t grid[3];
  int32_t block[3];
  int32_t static_shared_memory;
  int32_t dynamic_shared_memory;
  uint32_t local_memory_per_thread;
  uint32_t local_memory_total;
  uint32_t correlation_id;
  int64_t grid_id;
  const char* name;  // mangled
};
static_assert(offsetof(KernelActivity, start) == 16 && offsetof(KernelActivity, end) == 24);
static_assert(offsetof(KernelActivity, grid_id) == 96 && offsetof(KernelActivity, name) == 104);

inline constexpr size_t kBufferAlignment = 8;

using Context = void*;  // CUcontext
using BufferRequested = void (*)(uint8_t** buffer, size_t* size, size_t* max_records);
using BufferCompleted = void (*)(Context context, uint32_t stream, uint8_t* buffer, size_t size, size_t valid_size);

// By the names of the symbols.
struct Api {
  Result (*cuptiGetVersion)(uint32_t* version);
  Result (*cuptiGetResultString)(Result result, const char** text);
  Result (*cuptiActivityRegisterCallbacks)(BufferRequested requested, BufferCompleted completed);
  Result (*cuptiActivityEnable)(ActivityKind kind);
  Result (*cuptiActivityDisable)(ActivityKind kind);
  Result (*cuptiActivityFlushAll)(uint32_t flags);
  Result (*cuptiActivityGetNextRecord)(uint8_t* buffer, size_t valid_size, Activity** record);
  Result (*cuptiActivityGetNumDroppedRecords)(Context context, uint32_t stream, size_t* dropped);
};

}  // namespace lockstep::cupti

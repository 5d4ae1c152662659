// cupti_abi.h against the header of a real CUPTI, whichever version it is. All of it is checked by the compiler.
#include "tools/bench/cupti_abi.h"

#include <cupti.h>
#include <gtest/gtest.h>

#include <type_traits>

namespace lockstep::cupti {
namespace {

static_assert(CUPTI_API_VERSION >= kMinVersion);
static_assert(static_cast<int>(kSuccess) == CUPTI_SUCCESS);
static_assert(static_cast<int>(kMaxLimitReached) == CUPTI_ERROR_MAX_LIMIT_REACHED);
static_assert(static_cast<int>(kConcurrentKernel) == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
static_assert(kFlushForced == CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
static_assert(sizeof(Result) == sizeof(CUptiResult) && sizeof(ActivityKind) == sizeof(CUpti_ActivityKind));
static_assert(offsetof(Activity, kind) == offsetof(CUpti_Activity, kind));
static_assert(kBufferAlignment >= ACTIVITY_RECORD_ALIGNMENT);

// The record's struct has a new name in each version; this is the oldest with all that is read here.
using Theirs = CUpti_ActivityKernel9;
static_assert(offsetof(KernelActivity, kind) == offsetof(Theirs, kind));
static_assert(offsetof(KernelActivity, start) == offsetof(Theirs, start));
static_assert(offsetof(KernelActivity, end) == offsetof(Theirs, end));
static_assert(offsetof(KernelActivity, grid) == offsetof(Theirs, gridX));
static_assert(offsetof(KernelActivity, block) == offsetof(Theirs, blockX));
static_assert(offsetof(KernelActivity, correlation_id) == offsetof(Theirs, correlationId));
static_assert(offsetof(KernelActivity, name) == offsetof(Theirs, name));
static_assert(sizeof(KernelActivity) <= sizeof(Theirs));
#if CUPTI_API_VERSION >= 130000
static_assert(offsetof(KernelActivity, start) == offsetof(CUpti_ActivityKernel10, start));
static_assert(offsetof(KernelActivity, name) == offsetof(CUpti_ActivityKernel10, name));
#endif

static_assert(std::is_same_v<BufferRequested, CUpti_BuffersCallbackRequestFunc>);
static_assert(sizeof(Context) == sizeof(CUcontext));

TEST(CuptiAbi, TheDeclarationsCompile) {
  const CUpti_ActivityKind kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  EXPECT_EQ(static_cast<int>(kind), kConcurrentKernel);
}

}  // namespace
}  // namespace lockstep::cupti

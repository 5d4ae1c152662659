// nccl_abi.h against the header of a real NCCL, whichever version it is. All of it is checked by the compiler.
#include "weights_sync/nccl_abi.h"

#include <gtest/gtest.h>
#include <nccl.h>

#include <type_traits>

namespace lockstep::nccl {
namespace {

template <typename Mine, typename Theirs>
constexpr bool Same(Mine ours, Theirs theirs) {
  return static_cast<int>(ours) == static_cast<int>(theirs);
}
static_assert(Same(kSuccess, ncclSuccess) && Same(kUnhandledCudaError, ncclUnhandledCudaError));
static_assert(Same(kSystemError, ncclSystemError) && Same(kInternalError, ncclInternalError));
static_assert(Same(kInvalidArgument, ncclInvalidArgument) && Same(kInvalidUsage, ncclInvalidUsage));
static_assert(Same(kRemoteError, ncclRemoteError) && Same(kInProgress, ncclInProgress));
static_assert(Same(kInt8, ncclInt8) && Same(kUint8, ncclUint8));
static_assert(sizeof(Result) == sizeof(ncclResult_t) && sizeof(DataType) == sizeof(ncclDataType_t));
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId) && alignof(UniqueId) == alignof(ncclUniqueId));
static_assert(kUndefinedInt == NCCL_CONFIG_UNDEF_INT);
static_assert(kMinVersion == NCCL_VERSION(2, 18, 0) && NCCL_VERSION_CODE >= kMinVersion);

static_assert(sizeof(Config) <= sizeof(ncclConfig_t));
static_assert(offsetof(Config, size) == offsetof(ncclConfig_t, size));
static_assert(offsetof(Config, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(Config, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(Config, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize));
static_assert(offsetof(Config, min_ctas) == offsetof(ncclConfig_t, minCTAs));
static_assert(offsetof(Config, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(Config, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(Config, split_share) == offsetof(ncclConfig_t, splitShare));

// A parameter's type here for one of nccl.h.
template <typename T>
struct Ours {
  using type = T;
};
template <>
struct Ours<ncclResult_t> {
  using type = Result;
};
template <>
struct Ours<ncclResult_t*> {
  using type = Result*;
};
template <>
struct Ours<ncclDataType_t> {
  using type = DataType;
};
template <>
struct Ours<ncclUniqueId> {
  using type = UniqueId;
};
template <>
struct Ours<ncclUniqueId*> {
  using type = UniqueId*;
};
template <>
struct Ours<ncclComm_t> {
  using type = Comm;
};
template <>
struct Ours<ncclComm_t*> {
  using type = Comm*;
};
template <>
struct Ours<ncclConfig_t*> {
  using type = Config*;
};
template <>
struct Ours<cudaStream_t> {
  using type = Stream;
};
template <typename R, typename... Args>
constexpr auto Translate(R (*)(Args...)) -> typename Ours<R>::type (*)(typename Ours<Args>::type...);

#define LOCKSTEP_SAME_SIGNATURE(name) static_assert(std::is_same_v<decltype(Translate(&::name)), decltype(Api::name)>)
LOCKSTEP_SAME_SIGNATURE(ncclGetVersion);
LOCKSTEP_SAME_SIGNATURE(ncclGetUniqueId);
LOCKSTEP_SAME_SIGNATURE(ncclCommInitRankConfig);
LOCKSTEP_SAME_SIGNATURE(ncclCommGetAsyncError);
LOCKSTEP_SAME_SIGNATURE(ncclBroadcast);
LOCKSTEP_SAME_SIGNATURE(ncclGroupStart);
LOCKSTEP_SAME_SIGNATURE(ncclGroupEnd);
LOCKSTEP_SAME_SIGNATURE(ncclCommFinalize);
LOCKSTEP_SAME_SIGNATURE(ncclCommDestroy);
LOCKSTEP_SAME_SIGNATURE(ncclCommAbort);
LOCKSTEP_SAME_SIGNATURE(ncclGetErrorString);
LOCKSTEP_SAME_SIGNATURE(ncclGetLastError);
#undef LOCKSTEP_SAME_SIGNATURE

TEST(NcclAbi, InitialisersAgree) {
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const Config ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_LE(ours.size, theirs.size);
  EXPECT_LE(ours.version, theirs.version);
  EXPECT_EQ(ours.blocking, theirs.blocking);
  EXPECT_EQ(ours.split_share, theirs.splitShare);
}

}  // namespace
}  // namespace lockstep::nccl

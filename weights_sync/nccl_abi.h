// The part of NCCL's C ABI that is used here, declared by us: a build needs no nccl.h, and the library is found at run
// time (nccl_library.h). nccl_abi_test compares it with a real nccl.h where CMake finds one.
#pragma once

#include <climits>
#include <cstddef>

namespace lockstep::nccl {

// 2.18: the first whose configuration has all fields of Config below.
inline constexpr int kMinVersion = 21800;

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum DataType : int { kInt8 = 0, kUint8 = 1 };

inline constexpr size_t kUniqueIdBytes = 128;
struct UniqueId {
  char internal[kUniqueIdBytes];
};

struct OpaqueComm;
using Comm = OpaqueComm*;
using Stream = void*;  // cudaStream_t

inline constexpr int kUndefinedInt = INT_MIN;

// ncclConfig_t as of 2.18. A library reads min(size, its own size) bytes over its defaults, and then resets each field
// that is newer than `version`: later libraries have grown it at the end only. Both numbers must therefore be those of
// this layout. (2.25 put a field into what is padding here; `version` makes it disregard what stands there.)
struct Config {
  size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kMinVersion;
  int blocking = kUndefinedInt;
  int cga_cluster_size = kUndefinedInt;
  int min_ctas = kUndefinedInt;
  int max_ctas = kUndefinedInt;
  const char* net_name = nullptr;
  int split_share = kUndefinedInt;
};
static_assert(sizeof(Config) == 48 && offsetof(Config, net_name) == 32 && offsetof(Config, split_share) == 40);

// By the names of the symbols.
struct Api {
  Result (*ncclGetVersion)(int* version);
  Result (*ncclGetUniqueId)(UniqueId* id);
  Result (*ncclCommInitRankConfig)(Comm* comm, int nranks, UniqueId id, int rank, Config* config);
  Result (*ncclCommGetAsyncError)(Comm comm, Result* result);
  Result (*ncclBroadcast)(const void* send, void* receive, size_t count, DataType type, int root, Comm comm,
                          Stream stream);
  Result (*ncclGroupStart)();
  Result (*ncclGroupEnd)();
  Result (*ncclCommFinalize)(Comm comm);
  Result (*ncclCommDestroy)(Comm comm);
  Result (*ncclCommAbort)(Comm comm);
  const char* (*ncclGetErrorString)(Result result);
  const char* (*ncclGetLastError)(Comm comm);  // null where the library has none
};

}  // namespace lockstep::nccl

// NCCL's C ABI, as far as weights_sync/nccl_abi.h goes, over TCP of the loopback and host memory. Where NCCL leaves
// room this is strict: a call on a communicator that is in progress is an error, and so is a stream.
//
// FAKE_NCCL_VERSION: what ncclGetVersion gives, 22800 unless set.
#include <cstdlib>
#include <utility>
#include <vector>

#include "tests/fake_nccl/communicator.h"
#include "tests/fake_nccl/rendezvous.h"

using namespace lockstep::nccl;  // NOLINT: this file is the library
using fake_nccl::Broadcast;
using fake_nccl::Communicator;
using fake_nccl::SetLastError;

namespace {

// Between ncclGroupStart and ncclGroupEnd of a thread.
struct OpenGroup {
  int depth = 0;
  Result error = kSuccess;
  std::vector<std::pair<Communicator*, std::vector<Broadcast>>> pending;
};
thread_local OpenGroup open_group;

Communicator* Get(Comm comm) {
  return reinterpret_cast<Communicator*>(comm);
}

Result Begin(Communicator* communicator, std::vector<Broadcast> broadcasts) {
  const Result result = communicator->Begin(std::move(broadcasts));
  return result == kInProgress && communicator->blocking() ? communicator->Wait() : result;
}

Result Check(Communicator* communicator, const Broadcast& broadcast, DataType type, Stream stream) {
  const char* wrong = communicator == nullptr                                          ? "comm is null"
                      : stream != nullptr                                              ? "stream: want null"
                      : type != kInt8 && type != kUint8                                ? "type: want bytes"
                      : broadcast.root < 0 || broadcast.root >= communicator->nranks() ? "root is no rank"
                      : broadcast.bytes > 0 && !(broadcast.send && broadcast.receive)  ? "a buffer is null"
                      : communicator->state() == kInProgress ? "the communicator is in progress: poll it first"
                                                             : nullptr;
  if (wrong == nullptr) return communicator->state();
  SetLastError("ncclBroadcast: %s", wrong);
  return kInvalidArgument;
}

}  // namespace

#define FAKE_NCCL_EXPORT extern "C" __attribute__((visibility("default")))

FAKE_NCCL_EXPORT Result ncclGetVersion(int* version) {
  const char* value = std::getenv("FAKE_NCCL_VERSION");
  *version = value == nullptr ? 22800 : std::atoi(value);
  return kSuccess;
}

FAKE_NCCL_EXPORT Result ncclGetUniqueId(UniqueId* id) {
  return fake_nccl::MakeUniqueId(id);
}

FAKE_NCCL_EXPORT Result ncclCommInitRankConfig(Comm* comm, int nranks, UniqueId id, int rank, Config* config) {
  *comm = nullptr;
  if (nranks < 1 || rank < 0 || rank >= nranks || config == nullptr || config->magic != Config().magic) {
    SetLastError("ncclCommInitRankConfig: rank %d of %d, or no configuration", rank, nranks);
    return kInvalidArgument;
  }
  auto* communicator = new Communicator(nranks, id, rank, config->blocking != 0);
  *comm = reinterpret_cast<Comm>(communicator);
  return communicator->blocking() ? communicator->Wait() : kInProgress;
}

FAKE_NCCL_EXPORT Result ncclCommGetAsyncError(Comm comm, Result* result) {
  if (comm == nullptr || result == nullptr) return kInvalidArgument;
  *result = Get(comm)->state();
  return kSuccess;
}

FAKE_NCCL_EXPORT Result ncclBroadcast(const void* send, void* receive, size_t count, DataType type, int root, Comm comm,
                                      Stream stream) {
  const Broadcast broadcast = {send, receive, count, root};
  const Result result = Check(Get(comm), broadcast, type, stream);
  if (open_group.depth == 0) return result == kSuccess ? Begin(Get(comm), {broadcast}) : result;
  if (result != kSuccess) {
    open_group.error = result;
    return result;
  }
  for (auto& [communicator, broadcasts] : open_group.pending) {
    if (communicator != Get(comm)) continue;
    broadcasts.push_back(broadcast);
    return kSuccess;
  }
  open_group.pending.push_back({Get(comm), {broadcast}});
  return kSuccess;
}

FAKE_NCCL_EXPORT Result ncclGroupStart() {
  ++open_group.depth;
  return kSuccess;
}

FAKE_NCCL_EXPORT Result ncclGroupEnd() {
  if (open_group.depth == 0) {
    SetLastError("ncclGroupEnd: no group is open");
    return kInvalidUsage;
  }
  if (--open_group.depth > 0) return kSuccess;
  OpenGroup group = std::exchange(open_group, {});
  if (group.error != kSuccess) return group.error;
  // All begin before one of them is waited for.
  Result result = kSuccess;
  for (auto& [communicator, broadcasts] : group.pending) {
    const Result begun = communicator->Begin(std::move(broadcasts));
    if (result == kSuccess || begun != kInProgress) result = begun;
  }
  for (const auto& [communicator, broadcasts] : group.pending)
    if (communicator->blocking() && result == kInProgress) result = communicator->Wait();
  return result;
}

FAKE_NCCL_EXPORT Result ncclCommFinalize(Comm comm) {
  if (comm == nullptr) return kInvalidArgument;
  const Result result = Get(comm)->Finalize();
  return result == kInProgress && Get(comm)->blocking() ? Get(comm)->Wait() : result;
}

FAKE_NCCL_EXPORT Result ncclCommDestroy(Comm comm) {
  if (comm == nullptr) return kSuccess;
  if (Get(comm)->state() == kInProgress) {
    SetLastError("ncclCommDestroy: the communicator is in progress: poll it first");
    return kInvalidArgument;
  }
  delete Get(comm);
  return kSuccess;
}

FAKE_NCCL_EXPORT Result ncclCommAbort(Comm comm) {
  delete Get(comm);
  return kSuccess;
}

FAKE_NCCL_EXPORT const char* ncclGetErrorString(Result result) {
  switch (result) {
    case kSuccess:
      return "no error";
    case kUnhandledCudaError:
      return "unhandled cuda error";
    case kSystemError:
      return "unhandled system error";
    case kInternalError:
      return "internal error";
    case kInvalidArgument:
      return "invalid argument";
    case kInvalidUsage:
      return "invalid usage";
    case kRemoteError:
      return "a peer exited, or the network failed";
    case kInProgress:
      return "in progress";
  }
  return "unknown result";
}

FAKE_NCCL_EXPORT const char* ncclGetLastError(Comm) {
  return fake_nccl::LastError();
}

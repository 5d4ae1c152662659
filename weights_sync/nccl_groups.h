// The communicators that this worker is a rank of, by name. A group's members change by a new generation of it: whoever
// brings the survivors together again counts up.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "weights_sync/call_limit.h"
#include "weights_sync/nccl_group.h"
#include "weights_sync/nccl_library.h"

namespace lockstep {

struct GroupJoin {
  std::string group;
  int64_t generation = 0;
  int nranks = 0;
  int rank = 0;
  int root = 0;  // the rank that sends
  std::string unique_id;
  int max_ctas = 0;  // 0: NCCL's choice
};

// Thread-safe.
class NcclGroups {
 public:
  // One member of one group; whoever broadcasts holds `use`.
  struct Member {
    GroupJoin join;
    absl::Mutex use;
    std::unique_ptr<NcclGroup> group ABSL_GUARDED_BY(use);
    // Another generation came, or Leave: the broadcast under way must end.
    std::atomic<bool> replaced = false;
  };

  // library: as NcclLibrary::Load takes it; loaded by the first Join. use_device makes the device of the communicators
  // the calling thread's.
  NcclGroups(std::string library, std::function<absl::Status()> use_device)
      : path_(std::move(library)), use_device_(std::move(use_device)) {}
  ~NcclGroups();

  // Waits for other Joins and until all ranks have come. The same generation again: OK, unless its communicator has
  // failed. A later one replaces the earlier. FAILED_PRECONDITION: an earlier generation, or a failed one again.
  // UNIMPLEMENTED: no library.
  absl::Status Join(const GroupJoin& join, const CallLimit& limit);
  // NOT_FOUND, FAILED_PRECONDITION (another generation).
  absl::StatusOr<std::shared_ptr<Member>> Find(const std::string& group, int64_t generation);
  // Whether there was one.
  bool Leave(const std::string& group);

  std::string nccl_version();  // "2.28.3"; empty before the first Join

 private:
  absl::StatusOr<std::shared_ptr<NcclLibrary>> Library();
  // With joining_.
  absl::Status JoinAlone(std::shared_ptr<NcclLibrary> library, const GroupJoin& join, const CallLimit& limit);
  // Ends what it does and its communicator.
  void End(Member& member);

  const std::string path_;
  const std::function<absl::Status()> use_device_;
  absl::Mutex mutex_;
  bool joining_ ABSL_GUARDED_BY(mutex_) = false;  // one Join at a time
  std::shared_ptr<NcclLibrary> library_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::shared_ptr<Member>> members_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace lockstep

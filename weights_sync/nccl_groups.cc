#include "weights_sync/nccl_groups.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "rollout/base/status.h"

namespace lockstep {

NcclGroups::~NcclGroups() {
  absl::MutexLock lock(&mutex_);
  for (auto& [name, member] : members_) End(*member);
}

absl::StatusOr<std::shared_ptr<NcclLibrary>> NcclGroups::Library() {
  absl::MutexLock lock(&mutex_);
  if (library_ != nullptr) return library_;
  const absl::StatusOr<std::shared_ptr<NcclLibrary>> library = NcclLibrary::Load(path_);
  if (!library.ok()) {
    return absl::UnimplementedError(
        absl::StrCat("no NCCL here (--nccl_library): ", library.status().message(), "; use the stream"));
  }
  library_ = *library;
  return library_;
}

void NcclGroups::End(Member& member) {
  member.replaced = true;
  absl::MutexLock lock(&member.use);
  // A failure to make the device current shows in NCCL's calls.
  (void)use_device_();
  member.group.reset();
}

absl::Status NcclGroups::Join(const GroupJoin& join, const CallLimit& limit) {
  // Before an earlier generation is ended for it.
  LOCKSTEP_RETURN_IF_ERROR(NcclGroup::CheckArguments(join.unique_id, join.nranks, join.rank));
  LOCKSTEP_ASSIGN_OR_RETURN(std::shared_ptr<NcclLibrary> library, Library());
  {
    absl::MutexLock lock(&mutex_);
    const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !joining_; };
    if (!limit.Await(mutex_, absl::Condition(&free))) {
      LOCKSTEP_RETURN_IF_ERROR(limit.CheckClient());
      return absl::DeadlineExceededError("timeout_ms: another Join is still waiting for its ranks");
    }
    joining_ = true;
  }
  absl::Status joined = JoinAlone(std::move(library), join, limit);
  absl::MutexLock lock(&mutex_);
  joining_ = false;
  return joined;
}

absl::Status NcclGroups::JoinAlone(std::shared_ptr<NcclLibrary> library, const GroupJoin& join,
                                   const CallLimit& limit) {
  std::shared_ptr<Member> earlier;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = members_.find(join.group);
    if (found != members_.end()) earlier = found->second;
  }
  if (earlier != nullptr) {
    if (join.generation < earlier->join.generation) {
      return absl::FailedPreconditionError(absl::StrCat("generation: ", join.generation, " of group ", join.group,
                                                        " is over; generation ", earlier->join.generation, " is"));
    }
    if (join.generation == earlier->join.generation) {
      absl::MutexLock lock(&earlier->use);
      // Null: a Leave has come between.
      const bool healthy = earlier->group != nullptr && earlier->group->healthy();
      if (healthy && earlier->join.unique_id == join.unique_id) return absl::OkStatus();
      return absl::FailedPreconditionError(absl::StrCat(
          "generation: ", join.generation, " of group ", join.group,
          healthy ? " was joined with another unique_id" : " has failed or was left", "; want a later one"));
    }
    {
      absl::MutexLock lock(&mutex_);
      members_.erase(join.group);
    }
    End(*earlier);
  }
  LOCKSTEP_RETURN_IF_ERROR(use_device_());
  auto member = std::make_shared<Member>();
  member->join = join;
  LOCKSTEP_ASSIGN_OR_RETURN(std::unique_ptr<NcclGroup> group,
                            NcclGroup::Create(std::move(library), join.unique_id, join.nranks, join.rank,
                                              limit.deadline, join.max_ctas, limit.cancelled));
  {
    absl::MutexLock lock(&member->use);
    member->group = std::move(group);
  }
  absl::MutexLock lock(&mutex_);
  members_[join.group] = std::move(member);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<NcclGroups::Member>> NcclGroups::Find(const std::string& group, int64_t generation) {
  absl::MutexLock lock(&mutex_);
  const auto found = members_.find(group);
  if (found == members_.end()) {
    return absl::NotFoundError(absl::StrCat("group: this worker is in no group \"", group, "\"; Join first"));
  }
  if (found->second->join.generation != generation) {
    return absl::FailedPreconditionError(absl::StrCat("generation: ", generation, " of group ", group,
                                                      "; this worker is in generation ",
                                                      found->second->join.generation));
  }
  return found->second;
}

bool NcclGroups::Leave(const std::string& group) {
  std::shared_ptr<Member> member;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = members_.find(group);
    if (found == members_.end()) return false;
    member = found->second;
    members_.erase(found);
  }
  End(*member);
  return true;
}

std::string NcclGroups::nccl_version() {
  absl::MutexLock lock(&mutex_);
  return library_ == nullptr ? "" : NcclVersionName(library_->version());
}

}  // namespace lockstep

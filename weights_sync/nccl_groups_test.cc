// Against tests/fake_nccl: groups of one rank, or of two of which one never comes.
#include "weights_sync/nccl_groups.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/strings/match.h"
#include "absl/time/clock.h"

namespace lockstep {
namespace {

class NcclGroupsTest : public ::testing::Test {
 protected:
  static GroupJoin Alone(int64_t generation) {
    return {.group = "g",
            .generation = generation,
            .nranks = 1,
            .unique_id = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL).value()->UniqueId().value()};
  }
  bool InGeneration(int64_t generation) {
    const auto member = groups.Find("g", generation);
    if (!member.ok()) return false;
    absl::MutexLock lock(&(*member)->use);
    return (*member)->group != nullptr && (*member)->group->healthy();
  }

  NcclGroups groups{LOCKSTEP_FAKE_NCCL, [] { return absl::OkStatus(); }};
};

TEST_F(NcclGroupsTest, ALaterGenerationReplacesTheEarlier) {
  ASSERT_TRUE(groups.Join(Alone(1), {}).ok());
  EXPECT_TRUE(InGeneration(1));
  ASSERT_TRUE(groups.Join(Alone(2), {}).ok());
  EXPECT_FALSE(InGeneration(1));
  EXPECT_TRUE(InGeneration(2));
  EXPECT_TRUE(absl::IsFailedPrecondition(groups.Join(Alone(1), {})));
}

TEST_F(NcclGroupsTest, AJoinThatIsRefusedEndsNothing) {
  ASSERT_TRUE(groups.Join(Alone(1), {}).ok());
  GroupJoin join = Alone(2);
  join.unique_id = "short";
  const absl::Status status = groups.Join(join, {});
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  join = Alone(2);
  join.rank = 1;
  EXPECT_TRUE(absl::IsInvalidArgument(groups.Join(join, {})));
  EXPECT_TRUE(absl::IsCancelled(groups.Join(Alone(2), {.cancelled = [] { return true; }})));
  EXPECT_TRUE(InGeneration(1));
}

TEST_F(NcclGroupsTest, AJoinWaitsForAnotherNoLongerThanItsCall) {
  ASSERT_TRUE(groups.Join(Alone(1), {}).ok());
  std::atomic<bool> waits = false, gone = false;
  absl::Status first;
  std::thread waiting([&] {
    GroupJoin join = Alone(1);
    join.group = "of two";
    join.nranks = 2;
    // Asked for the first time before it waits for another Join, and then while it waits for its ranks.
    int asked = 0;
    first = groups.Join(join, {.cancelled = [&] {
                          waits = ++asked > 5;
                          return gone.load();
                        }});
  });
  while (!waits) absl::SleepFor(absl::Milliseconds(1));
  const absl::Status late = groups.Join(Alone(2), {.deadline = absl::Now() + absl::Milliseconds(5)});
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_TRUE(absl::StrContains(late.message(), "another Join")) << late;
  int asked = 0;
  EXPECT_TRUE(absl::IsCancelled(groups.Join(Alone(2), {.cancelled = [&] { return ++asked > 1; }})));
  EXPECT_TRUE(InGeneration(1));
  gone = true;
  waiting.join();
  EXPECT_TRUE(absl::IsCancelled(first)) << first;
  EXPECT_TRUE(groups.Join(Alone(2), {}).ok());
}

}  // namespace
}  // namespace lockstep

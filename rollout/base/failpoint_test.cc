#include "rollout/base/failpoint.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <set>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

class FailpointTest : public testing::Test {
 protected:
  ~FailpointTest() override { ArmFailpoints("").IgnoreError(); }
};

std::string Refused(absl::string_view spec) {
  const absl::Status status = ArmFailpoints(spec);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << spec;
  return std::string(status.message());
}

TEST_F(FailpointTest, NamesAreUnique) {
  std::set<std::string_view> names;
  for (const FailpointPlace& place : kFailpoints) names.insert(place.name);
  EXPECT_EQ(names.size(), kFailpoints.size());
  EXPECT_GE(names.size(), 20);
}

TEST_F(FailpointTest, NothingHappensUnarmed) {
  EXPECT_TRUE(FailpointStatus("weights.begin.before").ok());
  ASSERT_TRUE(ArmFailpoints("weights.begin.before=error(UNAVAILABLE)").ok());
  ASSERT_TRUE(ArmFailpoints(" ; ").ok());
  EXPECT_TRUE(FailpointStatus("weights.begin.before").ok());
}

TEST_F(FailpointTest, ErrorAtTheHitItIsFor) {
  ASSERT_TRUE(ArmFailpoints("weights.verify.before=error(UNAVAILABLE)@2; weights.commit.before=error(INTERNAL)").ok());
  EXPECT_TRUE(FailpointStatus("weights.verify.before").ok());
  const absl::Status status = FailpointStatus("weights.verify.before");
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("weights.verify.before"));
  EXPECT_TRUE(FailpointStatus("weights.verify.before").ok());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(FailpointStatus("weights.commit.before").code(), absl::StatusCode::kInternal) << "every time";
  }
}

TEST_F(FailpointTest, SeveralOfOneName) {
  ASSERT_TRUE(ArmFailpoints("weights.push.chunk=error(ABORTED)@1;weights.push.chunk=error(NOT_FOUND)@3").ok());
  EXPECT_EQ(FailpointStatus("weights.push.chunk").code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(FailpointStatus("weights.push.chunk").ok());
  EXPECT_EQ(FailpointStatus("weights.push.chunk").code(), absl::StatusCode::kNotFound);
}

TEST_F(FailpointTest, Sleeps) {
  ASSERT_TRUE(ArmFailpoints("weights.push.staged=sleep(80)@1").ok());
  const absl::Time begin = absl::Now();
  Failpoint("weights.push.staged");
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(80));
}

TEST_F(FailpointTest, WrongSpecsAreRefusedAndChangeNothing) {
  ASSERT_TRUE(ArmFailpoints("weights.begin.before=error(UNAVAILABLE)").ok());
  const std::string unknown = Refused("weights.begin.never=kill");
  EXPECT_THAT(unknown, HasSubstr("no failpoint \"weights.begin.never\""));
  for (const FailpointPlace& place : kFailpoints) EXPECT_THAT(unknown, HasSubstr(std::string(place.name)));
  EXPECT_THAT(Refused("weights.begin.before"), HasSubstr("no action \"\""));
  EXPECT_THAT(Refused("weights.begin.before=explode"), HasSubstr("no action \"explode\""));
  EXPECT_THAT(Refused("weights.begin.before=kill@0"), HasSubstr("@0"));
  EXPECT_THAT(Refused("weights.begin.before=kill@x"), HasSubstr("@x"));
  EXPECT_THAT(Refused("weights.begin.before=sleep(-1)"), HasSubstr("milliseconds"));
  EXPECT_THAT(Refused("weights.begin.before=sleep"), HasSubstr("no action"));
  EXPECT_THAT(Refused("weights.begin.before=error(OK)"), HasSubstr("no status code"));
  EXPECT_THAT(Refused("weights.push.staged=error(INTERNAL)"), HasSubstr("cannot return an error"));
  EXPECT_THAT(Refused("=kill"), HasSubstr("no failpoint \"\""));
  EXPECT_EQ(FailpointStatus("weights.begin.before").code(), absl::StatusCode::kUnavailable);
}

using FailpointDeathTest = FailpointTest;

TEST_F(FailpointDeathTest, Kills) {
  EXPECT_EXIT(
      {
        if (!ArmFailpoints("weights.push.staged=kill@2").ok()) std::_Exit(1);
        Failpoint("weights.push.staged");
        Failpoint("weights.push.staged");
        std::_Exit(0);
      },
      testing::KilledBySignal(SIGKILL), "");
}

TEST_F(FailpointDeathTest, StopsUntilContinued) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (!ArmFailpoints("weights.push.staged=stop@1").ok()) std::_Exit(1);
    Failpoint("weights.push.staged");
    std::_Exit(7);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
  ASSERT_TRUE(WIFSTOPPED(status));
  ASSERT_EQ(kill(child, SIGCONT), 0);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace lockstep

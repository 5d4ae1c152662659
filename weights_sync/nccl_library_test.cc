#include "weights_sync/nccl_library.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(NcclLibrary, Loads) {
  const auto library = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL);
  ASSERT_TRUE(library.ok()) << library.status();
  EXPECT_EQ((*library)->version(), 22800);
  const auto id = (*library)->UniqueId(), other = (*library)->UniqueId();
  ASSERT_TRUE(id.ok());
  EXPECT_EQ(id->size(), 128);
  EXPECT_NE(*id, *other);
}

TEST(NcclLibrary, NoSuchFile) {
  const absl::Status status = NcclLibrary::Load("/nowhere/libnccl.so.2").status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("/nowhere/libnccl.so.2"), HasSubstr("want libnccl.so.2 of NCCL 2.18 or newer")));
}

TEST(NcclLibrary, AnotherLibrary) {
  const absl::Status status = NcclLibrary::Load("libm.so.6").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("libm.so.6 has no symbol ncclGetVersion"));
}

TEST(NcclLibrary, TooOld) {
  setenv("FAKE_NCCL_VERSION", "21403", 1);
  const absl::Status status = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL).status();
  unsetenv("FAKE_NCCL_VERSION");
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("NCCL version 2.14.3; want 2.18 or newer"));
}

TEST(NcclLibrary, VersionNames) {
  EXPECT_EQ(NcclVersionName(2708), "2.7.8");
  EXPECT_EQ(NcclVersionName(21803), "2.18.3");
  EXPECT_EQ(NcclVersionName(23203), "2.32.3");
}

TEST(NcclLibrary, Statuses) {
  const auto library = NcclLibrary::Load(LOCKSTEP_FAKE_NCCL);
  ASSERT_TRUE(library.ok()) << library.status();
  EXPECT_TRUE((*library)->ToStatus(nccl::kSuccess, "x").ok());
  const absl::Status status = (*library)->ToStatus(nccl::kRemoteError, "a broadcast");
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("a broadcast: ncclRemoteError (6): a peer exited"));
  EXPECT_TRUE(absl::IsUnavailable((*library)->ToStatus(nccl::kSystemError, "x")));
  EXPECT_TRUE(absl::IsInternal((*library)->ToStatus(nccl::kInternalError, "x")));
  EXPECT_TRUE(absl::IsInternal((*library)->ToStatus(nccl::kUnhandledCudaError, "x")));
  EXPECT_TRUE(absl::IsInvalidArgument((*library)->ToStatus(nccl::kInvalidUsage, "x")));
}

}  // namespace
}  // namespace lockstep

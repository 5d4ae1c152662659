#include "tools/bench/cupti_library.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(CuptiLibrary, OneThatIsNotThereIsNamedWithTheFlag) {
  const absl::Status status = CuptiLibrary::Load("/nowhere/libcupti.so").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/libcupti.so"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--cupti_library"));
}

TEST(CuptiLibrary, AnotherLibraryLacksItsSymbols) {
  const absl::Status status = CuptiLibrary::Load("libm.so.6").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("libm.so.6 has no symbol cuptiGetVersion"));
}

}  // namespace
}  // namespace lockstep

// CUPTI found at run time, and what is recorded through it; with tests/fake_cupti in its place.
#include "tools/bench/cupti_library.h"

#include <dlfcn.h>

#include <cstdlib>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tools/bench/kernel_recorder.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

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

TEST(CuptiLibrary, AnOldOneIsRefused) {
  ASSERT_EQ(setenv("FAKE_CUPTI_VERSION", "17", 1), 0);
  const absl::Status status = CuptiLibrary::Load(LOCKSTEP_FAKE_CUPTI).status();
  unsetenv("FAKE_CUPTI_VERSION");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("version 17, want at least 18"));
}

class KernelRecorderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto library = CuptiLibrary::Load(LOCKSTEP_FAKE_CUPTI);
    ASSERT_TRUE(library.ok()) << library.status();
    library_ = *library;
    void* handle = dlopen(LOCKSTEP_FAKE_CUPTI, RTLD_NOW | RTLD_NOLOAD);
    launch_ = reinterpret_cast<void (*)(const char*, uint64_t, uint64_t)>(dlsym(handle, "fake_cupti_launch"));
    drop_ = reinterpret_cast<void (*)(size_t)>(dlsym(handle, "fake_cupti_drop"));
    ASSERT_TRUE(launch_ != nullptr && drop_ != nullptr);
  }

  CuptiLibrary library_ = {};
  void (*launch_)(const char* name, uint64_t start, uint64_t end) = nullptr;
  void (*drop_)(size_t records) = nullptr;
};

TEST_F(KernelRecorderTest, LaunchesComeInOrderOfStartAndOnce) {
  launch_("before", 1, 2);
  absl::StatusOr<KernelRecorder> recorder = KernelRecorder::Start(library_);
  ASSERT_TRUE(recorder.ok()) << recorder.status();
  // Two buffers' worth.
  for (const uint64_t start : {40, 10, 30, 20}) launch_(start == 10 ? "first" : "later", start, start + 5);
  const auto launches = recorder->Take();
  ASSERT_TRUE(launches.ok()) << launches.status();
  EXPECT_THAT(*launches, ElementsAre(Field(&KernelLaunch::start, 10), Field(&KernelLaunch::start, 20),
                                     Field(&KernelLaunch::start, 30), Field(&KernelLaunch::start, 40)));
  EXPECT_EQ((*launches)[0].name, "first");
  EXPECT_EQ((*launches)[0].end, 15u);
  EXPECT_THAT(*recorder->Take(), IsEmpty());
  EXPECT_TRUE(recorder->Stop().ok());
}

TEST_F(KernelRecorderTest, LostRecordsAreAnError) {
  absl::StatusOr<KernelRecorder> recorder = KernelRecorder::Start(library_);
  ASSERT_TRUE(recorder.ok());
  launch_("a", 10, 20);
  drop_(3);
  EXPECT_THAT(std::string(recorder->Take().status().message()), HasSubstr("lost 3 of 4 records"));
  launch_("without times", 0, 0);
  EXPECT_THAT(std::string(recorder->Take().status().message()), HasSubstr("lost 1 of 1 records"));
  launch_("b", 30, 40);
  EXPECT_EQ(recorder->Take()->size(), 1u);
  EXPECT_TRUE(recorder->Stop().ok());
}

TEST_F(KernelRecorderTest, ErrorsNameTheCall) {
  absl::StatusOr<KernelRecorder> recorder = KernelRecorder::Start(library_);
  ASSERT_TRUE(recorder->Stop().ok());
  EXPECT_EQ(recorder->Stop().message(), "cuptiActivityDisable: a fake error (999)");
}

}  // namespace
}  // namespace lockstep

#include "rollout/model/load_progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace lockstep {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

struct Recorder {
  std::vector<std::string> writes;
  steady_clock::time_point now;

  LoadProgress::Output Output(bool terminal) {
    return {terminal, [this](std::string_view text) { writes.emplace_back(text); }};
  }
  LoadProgress::Clock Clock() {
    return [this] { return now; };
  }
};

TEST(LoadProgress, LogLinesEveryTenPercentOfALongLoad) {
  Recorder recorder;
  LoadProgress progress("loading weights", 2'000'000'000, recorder.Output(false), recorder.Clock());
  for (int i = 0; i < 100; ++i) {
    recorder.now += milliseconds(200);
    progress.Advance(20'000'000);
  }
  progress.Finish();
  ASSERT_EQ(recorder.writes.size(), 10);
  EXPECT_EQ(recorder.writes[0], "loading weights: 10% (0.2 / 2.0 GB)");
  EXPECT_EQ(recorder.writes[8], "loading weights: 90% (1.8 / 2.0 GB)");
  EXPECT_EQ(recorder.writes[9], "loading weights: done (2.0 / 2.0 GB in 20.0 s)");
}

TEST(LoadProgress, AShortLoadIsOneLine) {
  Recorder recorder;
  LoadProgress progress("loading weights", 8'000'000, recorder.Output(false), recorder.Clock());
  for (int i = 0; i < 100; ++i) progress.Advance(80'000);
  progress.Finish();
  EXPECT_THAT(recorder.writes, ElementsAre("loading weights: done (8.0 / 8.0 MB in 0.0 s)"));
}

TEST(LoadProgress, BarRedrawsOneLineAndEndsIt) {
  Recorder recorder;
  {
    LoadProgress progress("loading weights", 1'000, recorder.Output(true), recorder.Clock());
    for (int i = 0; i < 1000; ++i) progress.Advance(1);
    progress.Finish();
  }
  EXPECT_LE(recorder.writes.size(), 104);
  EXPECT_GE(recorder.writes.size(), 100);
  for (size_t i = 0; i + 1 < recorder.writes.size(); ++i) {
    EXPECT_THAT(recorder.writes[i], StartsWith("\r"));
    EXPECT_EQ(recorder.writes[i].find('\n'), std::string::npos);
  }
  EXPECT_THAT(recorder.writes[50], HasSubstr(" 50%"));
  EXPECT_THAT(recorder.writes[50], HasSubstr("[" + std::string(20, '#') + std::string(20, ' ') + "]"));
  EXPECT_THAT(recorder.writes.back(), EndsWith("\n"));
}

TEST(LoadProgress, AFailedLoadLeavesTheBarsLine) {
  Recorder recorder;
  { LoadProgress progress("loading weights", 1'000, recorder.Output(true), recorder.Clock()); }
  EXPECT_EQ(recorder.writes.back(), "\n");
}

TEST(LoadProgress, NothingToLoad) {
  Recorder recorder;
  LoadProgress progress("loading weights", 0, recorder.Output(false), recorder.Clock());
  progress.Advance(0);
  progress.Finish();
  EXPECT_EQ(recorder.writes.size(), 1);
}

}  // namespace
}  // namespace lockstep

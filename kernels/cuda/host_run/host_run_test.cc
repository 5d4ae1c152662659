#include "kernels/cuda/host_run/host_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace lockstep::host_run {
namespace {

alignas(16) std::array<std::byte, 64> g_shared;

TEST(HostRun, EveryThreadOfEveryBlockRuns) {
  std::vector<int> seen(2 * 3 * 40);
  RunGrid("kernel", dim3(2, 3), 40, g_shared, [&] {
    EXPECT_EQ(GridDim().y, 3u);
    EXPECT_EQ(Threads(), 40);
    ++seen[(BlockIdx().y * 2 + BlockIdx().x) * 40 + ThreadIdx().x];
  });
  EXPECT_EQ(seen, std::vector<int>(seen.size(), 1));
}

TEST(HostRun, ABarrierHoldsThreadsUntilAllHaveCome) {
  int first = 0, second = 0;
  RunGrid("kernel", dim3(1), 64, g_shared, [&] {
    ++first;
    BlockBarrier(0, 64);
    EXPECT_EQ(first, 64);
    ++second;
    BlockBarrier(0, 64);
    EXPECT_EQ(second, 64);
  });
}

TEST(HostRun, AWarpsLanesExchangeValues) {
  RunGrid("kernel", dim3(1), 64, g_shared, [&] {
    const int mine = static_cast<int>(ThreadIdx().x);
    int got = -1;
    Collective("rotate", &mine, sizeof(mine), &got, sizeof(got), [](const std::byte* in, std::byte* out) {
      for (int i = 0; i < 32; ++i) std::memcpy(out + i * kLaneBytes, in + (i + 1) % 32 * kLaneBytes, sizeof(int));
    });
    EXPECT_EQ(got, mine / 32 * 32 + (mine + 1) % 32);
  });
}

// A kernel that reads what it has not waited for reads NaN.
TEST(HostRun, ACopyIsPoisonUntilItsBarrierIsComplete) {
  uint64_t barrier = 0;
  RunGrid("kernel", dim3(1), 2, g_shared, [&] {
    if (ThreadIdx().x == 0) InitBarrier(&barrier, 1);
    BlockBarrier(0, 2);
    if (ThreadIdx().x == 0) {
      Arrive(&barrier, 16);
      CopyLater(g_shared.data(), 16, &barrier, [] { std::memset(g_shared.data(), 7, 16); });
      EXPECT_EQ(g_shared[0], std::byte{0xFF});
    }
    WaitBarrier(&barrier, 0);
    EXPECT_EQ(g_shared[15], std::byte{7});
  });
}

TEST(HostRun, ProductsRunInOrderBeforeTheyAreWaitedFor) {
  std::vector<int> done;
  RunGrid("kernel", dim3(1), 1, g_shared, [&] {
    for (int group = 0; group < 20; ++group) {
      IssueProduct(1, [&, group] { done.push_back(2 * group); });
      IssueProduct(1, [&, group] { done.push_back(2 * group + 1); });
      CommitProducts();
      AwaitProducts(1);
      EXPECT_GE(done.size(), 2u * group);
    }
    AwaitProducts(0);
  });
  EXPECT_EQ(done.size(), 40u);
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
}

TEST(HostRunDeathTest, AThreadWaitsForItsProducts) {
  EXPECT_DEATH(RunGrid("kernel", dim3(1), 1, g_shared,
                       [] {
                         IssueProduct(1, [] {});
                         CommitProducts();
                         AwaitProducts(1);
                       }),
               "a thread ended before its products");
}

// So a kernel that lacks a barrier, or a wait for a copy, shows in some block.
TEST(HostRun, AnyWarpCanBeAheadAndCopiesCanComeSoonOrLast) {
  std::array<int, 2> ahead = {}, copied = {};
  uint64_t barrier = 0;
  int first = -1;
  RunGrid("kernel", dim3(32), 64, g_shared, [&] {
    const int thread = static_cast<int>(ThreadIdx().x);
    if (thread == 0) {
      first = -1;
      InitBarrier(&barrier, 1);
      Arrive(&barrier, 16);
      CopyLater(g_shared.data(), 16, &barrier, [] { std::memset(g_shared.data(), 7, 16); });
    }
    BlockBarrier(0, 64);
    for (int i = 0; i < 100; ++i) {
      std::byte b = {};
      Collective("shfl", &b, 1, &b, 1, [](const std::byte*, std::byte*) {});
    }
    if (first < 0) ++ahead[first = thread / 32];
    BlockBarrier(0, 64);
    if (thread == 0) ++copied[g_shared[0] == std::byte{7}];
    WaitBarrier(&barrier, 0);
  });
  EXPECT_GT(std::min(ahead[0], ahead[1]), 5);
  EXPECT_GT(std::min(copied[0], copied[1]), 5);
}

TEST(HostRunDeathTest, SaysWhatThreadsWaitForThatCannotGoOn) {
  EXPECT_DEATH(RunGrid("kernel", dim3(1), 2, g_shared,
                       [] {
                         if (ThreadIdx().x == 0) BlockBarrier(0, 2);
                       }),
               "kernel, block \\(0, 0, 0\\): no thread can go on\n  thread 0 waits for a block's barrier");
}

TEST(HostRunDeathTest, LanesOfAWarpTakeTheSameInstruction) {
  EXPECT_DEATH(RunGrid("kernel", dim3(1), 32, g_shared,
                       [] {
                         std::byte b = {};
                         Collective(ThreadIdx().x == 5 ? "mma" : "shfl", &b, 1, &b, 1,
                                    [](const std::byte*, std::byte*) {});
                       }),
               "lanes of one warp at (shfl and at mma|mma and at shfl)");
}

TEST(HostRunDeathTest, ABarrierIsGivenNoMoreThanItExpects) {
  uint64_t barrier = 0;
  EXPECT_DEATH(RunGrid("kernel", dim3(1), 1, g_shared, [&] { Arrive(&barrier, 0); }), "not initialised");
}

}  // namespace
}  // namespace lockstep::host_run

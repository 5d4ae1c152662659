#include "tools/bench/kernel_table.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;

// One attention layer whose key and value take 100 bytes a position, one GDN layer with a state of 5,000.
Traffic OneOfEach() {
  return {
      .weights = 0, .state = 5000, .windows = {{.keys = 0, .bytes = 100, .flops = 8, .layers = 1}}, .gdn_layers = 1};
}

KernelTable MakeTable() {
  return KernelTable({{"up", 10, 20, 400}, {"head", 10, 50, 1000}}, OneOfEach());
}

constexpr ProfiledStep kStep = {.rows = 2,
                                .logit_rows = 1,
                                .head_blocks = 1,
                                .decode_rows = 2,
                                .decode_kv_bytes = 6000,
                                .prompt_attention_flops = 0};

TEST(KernelTable, LinearLaunchesAreLayersInTheirOrder) {
  KernelTable table = MakeTable();
  table.AddStep(kStep,
                std::vector<KernelLaunch>{{"LinearTileKernel<1>", 0, 1000}, {"LinearTileKernel<1>", 1000, 3000}});
  const std::vector<KernelTable::Row> rows = table.Top(10);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].operation, "head");
  EXPECT_DOUBLE_EQ(rows[0].us, 2);
  // The weight, and one row in and out of two bytes a value.
  EXPECT_DOUBLE_EQ(*rows[0].gb_s, (1000 + 60 * 2) / 2000.0);
  EXPECT_DOUBLE_EQ(*rows[0].tflop_s, 2 * 10 * 50 / 2000.0 * 1e-3);
  EXPECT_EQ(rows[1].operation, "up");
  EXPECT_DOUBLE_EQ(*rows[1].gb_s, (400 + 2 * 30 * 2) / 1000.0);
}

TEST(KernelTable, SwiGluInALinearKernelStoresHalf) {
  KernelTable table = MakeTable();
  table.AddStep(kStep,
                std::vector<KernelLaunch>{{"LinearSwiGluTileKernel<1>", 0, 1000}, {"LinearTileKernel<1>", 1000, 3000}});
  const std::vector<KernelTable::Row> rows = table.Top(10);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].operation, "head");
  EXPECT_DOUBLE_EQ(*rows[0].gb_s, (1000 + 60 * 2) / 2000.0);
  EXPECT_EQ(rows[1].operation, "up");
  EXPECT_DOUBLE_EQ(*rows[1].gb_s, (400 + 2 * (10 + 10) * 2) / 1000.0);
  EXPECT_DOUBLE_EQ(*rows[1].tflop_s, 2 * 2 * 10 * 20 / 1000.0 * 1e-3);
}

TEST(KernelTable, AFamilyOfAnotherCountHasNoRates) {
  KernelTable table = MakeTable();
  table.AddStep(kStep, std::vector<KernelLaunch>{{"LinearTileKernel<1>", 0, 1000},
                                                 {"LinearTileKernel<1>", 1000, 3000},
                                                 {"LinearTileKernel<1>", 3000, 4000},
                                                 {"DecodeKernel", 4000, 5000},
                                                 {"DecodeKernel", 5000, 6000}});
  for (const KernelTable::Row& row : table.Top(10)) {
    EXPECT_EQ(row.operation, "");
    EXPECT_FALSE(row.gb_s || row.tflop_s) << row.kernel;
  }
}

TEST(KernelTable, DecodeReadsKeysValuesAndStates) {
  KernelTable table = MakeTable();
  table.AddStep(kStep,
                std::vector<KernelLaunch>{{"DecodeKernel", 0, 3000},
                                          {"void lockstep::cuda::(anonymous namespace)::GdnDecodeKernel<lockstep::"
                                           "cuda::gdn::TorchNorm<__nv_bfloat16> >(lockstep::cuda::GdnParams)",
                                           3000, 5000}});
  const std::vector<KernelTable::Row> rows = table.Top(10);
  EXPECT_EQ(rows[0].operation, "attention");
  EXPECT_DOUBLE_EQ(*rows[0].gb_s, 2);
  EXPECT_EQ(rows[1].operation, "gdn");
  EXPECT_DOUBLE_EQ(*rows[1].gb_s, 5);  // two sequences' states in 2 us
  KernelTable spread = MakeTable();
  spread.AddStep(kStep, std::vector<KernelLaunch>{{"ScoreKernel", 0, 1000}, {"ValueKernel", 1000, 4000}});
  EXPECT_DOUBLE_EQ(*spread.Top(10)[0].gb_s, 1);
  EXPECT_DOUBLE_EQ(*spread.Top(10)[1].gb_s, 3);
}

TEST(KernelTable, RowsTakenTogetherAreAKernelOfTheirOwn) {
  const std::vector<KernelLaunch> launches = {
      {"void lockstep::cuda::(anonymous namespace)::DecodeSharedKernel<Order, 4>(Args)", 0, 1000},
      {"void lockstep::cuda::(anonymous namespace)::DecodeKernel<Order, 4>(Args)", 1000, 5000}};
  ProfiledStep step = kStep;
  step.shared = {.moved = 1500, .spared = 2000};
  KernelTable table = MakeTable();
  table.AddStep(step, launches);
  std::vector<KernelTable::Row> rows = table.Top(10);
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].operation, "attention");
  EXPECT_DOUBLE_EQ(*rows[0].gb_s, (6000 - 2000) / 4000.0);
  EXPECT_EQ(rows[1].operation, "shared prefix");
  EXPECT_DOUBLE_EQ(*rows[1].gb_s, 1500 / 1000.0);
  // Launched, with nothing for it to do: where a window cuts every row off from what they share.
  KernelTable alone = MakeTable();
  alone.AddStep(kStep, launches);
  rows = alone.Top(10);
  EXPECT_DOUBLE_EQ(*rows[0].gb_s, 6000 / 4000.0);
  EXPECT_EQ(rows[1].operation, "shared prefix");
  EXPECT_FALSE(rows[1].gb_s);
  // Programs without such a kernel read everything for each row.
  KernelTable without = MakeTable();
  without.AddStep(step, std::span(launches).last(1));
  EXPECT_DOUBLE_EQ(*without.Top(1)[0].gb_s, 6000 / 4000.0);
  // One of two launches, with one attention layer: not known.
  KernelTable twice = MakeTable();
  twice.AddStep(step, std::vector<KernelLaunch>{launches[0], launches[0], launches[1]});
  for (const KernelTable::Row& row : twice.Top(10)) EXPECT_EQ(row.operation, "");
}

TEST(KernelTable, AnEarlyStartCountsFromTheEndOfTheKernelBefore) {
  KernelTable table = MakeTable();
  table.AddStep(kStep, std::vector<KernelLaunch>{{"A", 0, 10000}, {"B", 4000, 13000}, {"C", 5000, 12000}});
  const std::vector<KernelTable::Row> rows = table.Top(10);
  EXPECT_DOUBLE_EQ(rows[0].us, 10);
  EXPECT_DOUBLE_EQ(rows[1].us, 3);
  EXPECT_DOUBLE_EQ(rows[2].us, 0);  // hidden
  EXPECT_DOUBLE_EQ(table.busy_us(), 13);
}

TEST(KernelTable, TimeInWhichNoKernelRanIsTheNextOnes) {
  KernelTable table = MakeTable();
  table.AddStep(kStep, std::vector<KernelLaunch>{{"A", 5000, 10000}, {"B", 12000, 13000}, {"C", 12500, 14000}});
  table.AddStep(kStep, std::vector<KernelLaunch>{{"A", 90000, 95000}, {"B", 95000, 96000}, {"A", 99000, 99500}});
  const std::vector<KernelTable::Row> rows = table.Top(10);
  EXPECT_EQ(rows[0].kernel, "A");
  EXPECT_DOUBLE_EQ(rows[0].idle_us, 1.5);  // not what lies between the steps
  EXPECT_EQ(rows[1].kernel, "B");
  EXPECT_DOUBLE_EQ(rows[1].idle_us, 1);
  EXPECT_DOUBLE_EQ(rows[2].idle_us, 0);
  EXPECT_DOUBLE_EQ(table.idle_us(), 2.5);
}

TEST(KernelTable, FiguresAreOfOneStepAndTheSlowestComeFirst) {
  KernelTable table = MakeTable();
  for (int step = 0; step < 4; ++step) {
    table.AddStep(kStep, std::vector<KernelLaunch>{{"A", 0, 1000}, {"B", 1000, 4000}, {"A", 4000, 5000}});
  }
  EXPECT_THAT(table.Top(1), ElementsAre(Field(&KernelTable::Row::kernel, "B")));
  EXPECT_DOUBLE_EQ(table.Top(2)[1].calls, 2);
  EXPECT_DOUBLE_EQ(table.Top(2)[1].us, 2);
  EXPECT_DOUBLE_EQ(table.busy_us(), 5);
}

}  // namespace
}  // namespace lockstep

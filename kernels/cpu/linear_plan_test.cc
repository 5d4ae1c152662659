#include "kernels/cpu/linear_plan.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

TEST(LinearPlan, TasksCoverEveryOutputOnceAndFitTheScratch) {
  for (const int64_t rows : {1, 2, 7, 12, 13, 64, 191, 192, 193, 512, 1000}) {
    for (const int64_t panels : {1, 2, 3, 16, 17, 344, 3136}) {
      for (const int64_t in_features : {1, 256, 3840, 11008}) {
        for (const int64_t tile_rows : {6, 12}) {
          for (const int threads : {1, 2, 3, 64}) {
            for (const int64_t k_block : {0, 256, 512}) {
              const int64_t step_words = k_block == 512 ? 2 : 1;
              const LinearPlan plan({rows, in_features, panels, tile_rows, threads, k_block, step_words});
              SCOPED_TRACE(::testing::Message() << rows << " rows, " << panels << " panels, K " << in_features << ", "
                                                << threads << " threads");
              ASSERT_GE(plan.k_block(), 1);
              ASSERT_LE(plan.k_block(), in_features);
              if (k_block > 0) {
                ASSERT_EQ(plan.k_block(), std::min(k_block, in_features));
              }
              // Rows and panels are cut independently, so a grid of tasks covers all if each axis does.
              int64_t covered = 0;
              int64_t row = 0;
              for (int64_t i = 0; i < plan.tasks(); ++i) {
                const LinearPlan::Task task = plan.task(i);
                ASSERT_LT(task.row_begin, task.row_end);
                ASSERT_LT(task.panel_begin, task.panel_end);
                ASSERT_LE((task.row_end - task.row_begin) * plan.k_block() * step_words, plan.scratch_words());
                if (i % plan.panel_groups() == 0) {
                  ASSERT_EQ(task.row_begin, row);
                  ASSERT_EQ(task.panel_begin, 0);
                  row = task.row_end;
                } else {
                  ASSERT_EQ(task.panel_begin, plan.task(i - 1).panel_end);
                }
                covered += (task.row_end - task.row_begin) * (task.panel_end - task.panel_begin);
              }
              ASSERT_EQ(row, rows);
              ASSERT_EQ(covered, rows * panels);
            }
          }
        }
      }
    }
  }
}

TEST(LinearPlan, SmallWorkStaysOnOneThreadAndLargeWorkIsSpread) {
  EXPECT_EQ(LinearPlan({1, 256, 16, 12, 8}).tasks(), 1);
  EXPECT_GE(LinearPlan({1, 3840, 344, 12, 8}).tasks(), 32);
  EXPECT_GE(LinearPlan({64, 256, 16, 12, 2}).tasks(), 2);
  EXPECT_GE(LinearPlan({512, 3840, 120, 12, 8}).tasks(), 24);
  EXPECT_EQ(LinearPlan({512, 3840, 120, 12, 1}).panel_groups(), 1);
}

TEST(LinearPlan, AFewTasksDivideEvenly) {
  for (const int64_t rows : {8, 16, 24, 64}) {
    for (const int64_t panels : {8, 16, 24, 48}) {
      const LinearPlan plan({rows, 256, panels, 12, 2});
      EXPECT_TRUE(plan.tasks() == 1 || plan.tasks() % 2 == 0 || plan.tasks() > 8) << rows << " x " << panels;
    }
  }
}

TEST(LinearPlan, APackedBlockFitsL2) {
  for (const int64_t rows : {1, 12, 16, 64, 192, 512}) {
    EXPECT_LE(LinearPlan({rows, 11008, 120, 12, 2}).scratch_words() * 4, 512 * 1024) << rows;
    EXPECT_LE(LinearPlan({rows, 5504, 120, 12, 2, 512, 1}).scratch_words() * 4, 512 * 1024) << rows;
    EXPECT_LE(LinearPlan({rows, 5504, 120, 12, 2, 512, 2}).scratch_words() * 4, 512 * 1024) << rows;
  }
}

}  // namespace
}  // namespace lockstep

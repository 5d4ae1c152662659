#include "tools/bench/traffic.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

// Two layers that see everything, three that see 100 keys.
Traffic TwoKinds() {
  return {.weights = 1e6,
          .state = 500,
          .windows = {{.keys = 0, .bytes = 20, .flops = 4, .layers = 2},
                      {.keys = 100, .bytes = 30, .flops = 6, .layers = 3}}};
}

TEST(Traffic, KeysAndValuesWithinTheWindows) {
  EXPECT_EQ(TwoKinds().attention_layers(), 5);
  EXPECT_DOUBLE_EQ(TwoKinds().KvBytes(80), 80 * 50);
  EXPECT_DOUBLE_EQ(TwoKinds().KvBytes(1000), 1000 * 20 + 100 * 30);
}

TEST(Traffic, ADecodeStepMovesWeightsOnceAndTheRestForEachSequence) {
  EXPECT_DOUBLE_EQ(TwoKinds().DecodeStepBytes(8, 80), 1e6 + 8 * (80 * 50 + 500));
}

TEST(Traffic, SharedKeysAndValuesAreReadOnceAndStatesPassedForThem) {
  Traffic traffic = TwoKinds();
  traffic.windows[0].heads = 8;
  traffic.windows[1].heads = 12;
  const SharedAttention shared = {.shares = {{.positions = 256, .row_positions = {300, 400, 500}}}, .state_bytes = 10};
  // Without a window: three rows.
  const double keys = 256 * 20, states = 8 * 10;
  EXPECT_DOUBLE_EQ(traffic.SharedBytes(shared).moved, keys + 3 * states);
  EXPECT_DOUBLE_EQ(traffic.SharedBytes(shared).spared, 3 * (keys - states));
  // Of a window of 350 the first row alone; the states of all are written.
  traffic.windows[1].keys = 350;
  const double window_keys = 256 * 30, window_states = 12 * 10;
  EXPECT_DOUBLE_EQ(traffic.SharedBytes(shared).moved, keys + 3 * states + window_keys + 3 * window_states);
  EXPECT_DOUBLE_EQ(traffic.SharedBytes(shared).spared, 3 * (keys - states) + window_keys - window_states);
  EXPECT_DOUBLE_EQ(traffic.SharedBytes({}).moved, 0);
}

TEST(Traffic, PromptAttentionSeesATriangleCutOffByTheWindow) {
  double flops = 0;
  for (int row = 1; row <= 250; ++row) flops += row * 4 + std::min(row, 100) * 6;
  EXPECT_DOUBLE_EQ(TwoKinds().PromptAttentionFlops(250), flops);
  EXPECT_DOUBLE_EQ(TwoKinds().PromptAttentionFlops(0), 0);
}

// The shape of Olmo Hybrid 7B: 24 layers of 30 heads, 96 x 192.
TEST(Traffic, AStateOfTheChunkProgramIsReadAsItsImage) {
  const GdnShape shape{.key_heads = 30, .value_heads = 30, .key_dim = 96, .value_dim = 192};
  EXPECT_DOUBLE_EQ(GdnHeadBytes(shape, GdnProgram::kChunkFp32), 4.0 * 96 * 192);
  // The image of S; 31.5 rows of 960 bytes before it on average and the new one; a 64th of S in fp32 read and written,
  // its image written, and the chunk's rows read.
  const double row = 2.0 * (96 + 2 * 192), s = 96 * 192;
  EXPECT_DOUBLE_EQ(GdnHeadBytes(shape, GdnProgram::kChunkBf16), 2 * s + 32.5 * row + (10 * s + 64 * row) / 64);
}

}  // namespace
}  // namespace lockstep

// How a linear layer is cut into tiles and a ring of shared memory: a pure function of its shape and of the device's
// size, with its own test. Results do not depend on any of it: no tile splits k.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"

namespace lockstep::cuda {

// What a kernel makes of the products before it stores them.
enum class LinearFusion {
  kNone,
  kSwiGlu,  // out = silu(gate) * up: the weight is gate's n rows and then up's, [2n, k]
};

// out[m, n] = x[m, k] * w[n, k]^T
struct LinearShape {
  int64_t m = 0;
  int64_t n = 0;  // a multiple of 8
  int64_t k = 0;  // a multiple of 16
  LinearFusion fusion = LinearFusion::kNone;
};

// What a kernel is compiled for.
struct LinearTile {
  int warpgroups = 1;  // that multiply, side by side over tokens
  int blocks = 1;      // of 64 tokens each has
  int features = 64;   // rows of the weight; kSwiGlu: half of them gate's, the others up's

  constexpr int tokens() const { return warpgroups * blocks * 64; }
  constexpr int outputs(LinearFusion fusion) const { return fusion == LinearFusion::kSwiGlu ? features / 2 : features; }
  friend bool operator==(const LinearTile&, const LinearTile&) = default;
};

// Widths in features that kernels are compiled for, by warpgroups and blocks.
using LinearWidths1x1 = std::integer_sequence<int, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128,
                                              136, 144, 152, 160, 168, 176, 192, 208, 224, 240, 256>;
using LinearWidths2x1 = std::integer_sequence<int, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 152, 160, 168, 176,
                                              192, 208, 224, 240, 256>;
using LinearWidths2x2 = std::integer_sequence<int, 96, 128, 168, 192>;
// Of kSwiGlu: multiples of 16, so that gate's half is whole groups of the swizzle's 8 rows.
using LinearSwiGluWidths1x1 = std::integer_sequence<int, 16, 32, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240, 256>;
using LinearSwiGluWidths2x1 = std::integer_sequence<int, 64, 96, 128, 144, 160, 176, 192, 208, 224, 240, 256>;
using LinearSwiGluWidths2x2 = std::integer_sequence<int, 96, 128, 176, 192>;

// Boxes of 64 elements of k in a stage of the ring: small tiles take two at a time.
constexpr int LinearStageBoxes(int tokens, int features) {
  return tokens + features <= 128 ? 2 : 1;
}

constexpr int kLinearMaxStages = 32;

struct LinearPlan {
  LinearTile tile;
  int x_rows = 0;  // of x in a tile's boxes; the products of the tile's other tokens are never stored
  int stages = 0;
  int64_t stage_bytes = 0;
  int64_t shared_bytes = 0;
  int64_t thread_blocks = 0;  // they take the tiles in turn
  int64_t token_tiles = 0;
  int64_t feature_tiles = 0;
  int64_t group_tokens = 0;  // token tiles that one sweep over the features takes together
};

// The tile of the least estimated time for a shape on a device of `multiprocessors`.
LinearTile ChooseLinearTile(const LinearShape& shape, int multiprocessors);

// The rest of the plan for a given tile; an error if no such kernel is compiled.
absl::StatusOr<LinearPlan> PlanLinear(const LinearShape& shape, const LinearTile& tile, int multiprocessors);

}  // namespace lockstep::cuda

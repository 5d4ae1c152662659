#include "kernels/cuda/linear_plan.h"

#include <algorithm>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kRowBytes = 128;  // of 64 elements of k
// Shared memory of a block on Hopper, less the barriers; the ring is aligned to 1,024 bytes within it.
constexpr int64_t kSharedBytes = 232448 - 2 * kLinearMaxStages * 8;
constexpr int64_t kAlignment = 1024;
// Rows of x that stay in L2 while a sweep over the weights uses them: 45 MB at the widest k in use, of 50 MB.
constexpr int64_t kGroupTokens = 2048;

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <int... kWidths, class Visitor>
void VisitWidths(std::integer_sequence<int, kWidths...>, int warpgroups, int blocks, const Visitor& visit) {
  (visit(LinearTile{.warpgroups = warpgroups, .blocks = blocks, .features = kWidths}), ...);
}

template <class Visitor>
void VisitTiles(LinearFusion fusion, const Visitor& visit) {
  if (fusion == LinearFusion::kSwiGlu) {
    VisitWidths(LinearSwiGluWidths1x1(), 1, 1, visit);
    VisitWidths(LinearSwiGluWidths2x1(), 2, 1, visit);
    VisitWidths(LinearSwiGluWidths2x2(), 2, 2, visit);
  } else {
    VisitWidths(LinearWidths1x1(), 1, 1, visit);
    VisitWidths(LinearWidths2x1(), 2, 1, visit);
    VisitWidths(LinearWidths2x2(), 2, 2, visit);
  }
}

int CopiedRows(const LinearShape& shape, const LinearTile& tile) {
  return static_cast<int>(std::min<int64_t>(tile.tokens(), CeilDiv(shape.m, 8) * 8));
}

// In cycles of a multiprocessor. The constants are fitted to what an H200 did, at sizes from 1 to 8,192 tokens; but
// kActivated is the special function unit's rate, two functions an output.
double EstimateCycles(const LinearShape& shape, const LinearTile& tile, int multiprocessors) {
  constexpr double kMemoryBytes = 2150;     // a cycle, of the whole device
  constexpr double kSharedBandwidth = 128;  // bytes a cycle
  constexpr double kProducts = 128;         // outputs a cycle and group of 16 elements of k ...
  constexpr double kThrottle = 1.35;        // ... at the clock that the power limit leaves when all units multiply
  constexpr double kDependent = 30;         // between two products of one accumulator
  constexpr double kTileCycles = 1500;
  constexpr double kStoredOutputs = 16;  // a cycle
  constexpr double kActivated = 8;       // outputs a cycle, kSwiGlu
  const int64_t token_tiles = CeilDiv(shape.m, tile.tokens());
  const int64_t tiles = token_tiles * CeilDiv(shape.n, tile.outputs(shape.fusion));
  const auto rounds = static_cast<double>(CeilDiv(tiles, multiprocessors));
  const double products = tile.tokens() * tile.features;
  const double outputs = tile.tokens() * tile.outputs(shape.fusion);

  // A product reads 64 rows of x and all the tile's weights; a copy writes each once. 32 bytes a row and group.
  const double rows = CopiedRows(shape, tile) + tile.features + tile.tokens() / 64 * (64.0 + tile.features);
  const double shared = rows * 32 / kSharedBandwidth;
  const double group = std::max({kDependent, shared, products / kProducts * kThrottle}) + 0.1 * shared;
  const double activation = shape.fusion == LinearFusion::kSwiGlu ? outputs / kActivated : 0;
  const double work =
      rounds * (static_cast<double>(shape.k) / 16 * group + kTileCycles + activation + outputs / kStoredOutputs);
  // What the last round leaves idle pulls no weights; fewer multiprocessors pull nearly as fast as all.
  const auto all = static_cast<double>(multiprocessors);
  const double busy = static_cast<double>(std::min<int64_t>(tiles, multiprocessors));
  const double pulled = rounds * (0.9 * busy + 0.1 * all) * tile.features / static_cast<double>(token_tiles);
  const double memory = pulled * static_cast<double>(shape.k) * 2 / kMemoryBytes;
  // A little of the smaller one too: of tiles that wait for memory alike, the one with the least other work.
  return std::max(memory, work) + 0.05 * std::min(memory, work);
}

}  // namespace

LinearTile ChooseLinearTile(const LinearShape& shape, int multiprocessors) {
  LinearTile best;
  double least = std::numeric_limits<double>::infinity();
  VisitTiles(shape.fusion, [&](const LinearTile& tile) {
    const double cycles = EstimateCycles(shape, tile, multiprocessors);
    if (cycles >= least) return;
    least = cycles;
    best = tile;
  });
  return best;
}

absl::StatusOr<LinearPlan> PlanLinear(const LinearShape& shape, const LinearTile& tile, int multiprocessors) {
  bool compiled = false;
  VisitTiles(shape.fusion, [&](const LinearTile& other) { compiled |= other == tile; });
  if (!compiled) {
    return absl::InvalidArgumentError(absl::StrCat("LinearTile: no kernel of ", tile.warpgroups, " x ", tile.blocks,
                                                   " x ", tile.features,
                                                   shape.fusion == LinearFusion::kSwiGlu ? " with SwiGLU" : ""));
  }
  LinearPlan plan{.tile = tile};
  plan.x_rows = CopiedRows(shape, tile);
  const int boxes = LinearStageBoxes(tile.tokens(), tile.features);
  plan.stage_bytes = boxes * (plan.x_rows + tile.features) * kRowBytes;
  // The products read all tokens' rows, past the ring's end if few were copied.
  const int64_t overhang = std::max(0, tile.tokens() - plan.x_rows - boxes * tile.features) * kRowBytes;
  const int64_t room = (kSharedBytes - kAlignment - overhang) / plan.stage_bytes;
  const int64_t wanted = std::max<int64_t>(2, CeilDiv(shape.k, boxes * 64));
  plan.stages = static_cast<int>(std::min<int64_t>({room, wanted, kLinearMaxStages}));
  plan.shared_bytes = kAlignment + plan.stages * plan.stage_bytes + overhang;
  plan.token_tiles = CeilDiv(shape.m, tile.tokens());
  plan.feature_tiles = CeilDiv(shape.n, tile.outputs(shape.fusion));
  plan.thread_blocks = std::min<int64_t>(plan.token_tiles * plan.feature_tiles, multiprocessors);
  plan.group_tokens = std::min<int64_t>(plan.token_tiles, kGroupTokens / tile.tokens());
  return plan;
}

}  // namespace lockstep::cuda

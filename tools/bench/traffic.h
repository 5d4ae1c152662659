// What steps must move through memory, at least: what floors and bandwidths are counted from.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/numerics.h"
#include "kernels/ops.h"
#include "rollout/model/spec.h"
#include "rollout/model/weights.h"

namespace lockstep {

// Decode attention that reads what rows share once, in a kernel before that of each row's own, in all attention layers.
struct SharedAttentionBytes {
  double moved = 0;   // by the kernel before: keys and values of each share once, and each row's state written
  double spared = 0;  // in the rows' own kernel: the keys and values it need not read, less the states it reads
};

struct Traffic {
  double weights = 0;  // bytes: every weight but the embedding table, once a step
  double state = 0;    // bytes: the recurrent state of one sequence, for one new row, mean over the rows of a chunk
  struct Window {
    int64_t keys = 0;  // that a row sees; 0: all
    double bytes = 0;  // keys and values of one position in all layers of this window
    double flops = 0;  // of one row and one key it sees, both products, in all layers of this window
    int64_t layers = 0;
    int64_t heads = 0;  // query heads in all layers of this window
  };
  std::vector<Window> windows;
  int64_t gdn_layers = 0;

  int64_t attention_layers() const;
  // Keys and values that one row reads which sees `context` positions, in all attention layers.
  double KvBytes(int64_t context) const;
  // Of a decode step: every sequence has a context of its own.
  double DecodeStepBytes(int64_t batch, int64_t context) const;
  SharedAttentionBytes SharedBytes(const SharedAttention& shared) const;
  // Multiplications and additions of attention over a prompt's first `tokens` rows.
  double PromptAttentionFlops(int64_t tokens) const;
};

// What one value head of a GDN layer must move for a new row, mean over the rows of a chunk.
double GdnHeadBytes(const GdnShape& shape, GdnProgram program);

Traffic TrafficOf(const ModelSpec& spec, const ModelWeights& weights, const Ops& ops);

}  // namespace lockstep

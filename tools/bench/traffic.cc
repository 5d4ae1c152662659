#include "tools/bench/traffic.h"

#include <algorithm>

namespace lockstep {

// fla's program (docs/numerics.md): the bf16 image of S, the k, bf16(beta v) and v' of the rows so far, the new ones,
// and once a chunk S in fp32, read and written, and its image; the solve's rows, some 5% more, are left out. Else S in
// fp32.
double GdnHeadBytes(const GdnShape& shape, GdnProgram program) {
  const double state = static_cast<double>(shape.key_dim * shape.value_dim);
  if (program != GdnProgram::kChunkBf16) return 4 * state;
  const double row = 2.0 * static_cast<double>(shape.key_dim + 2 * shape.value_dim);
  const double chunk_end = (4 + 4 + 2) * state + kGdnChunk * row;
  return 2 * state + (kGdnChunk - 1) / 2.0 * row + row + chunk_end / kGdnChunk;
}

Traffic TrafficOf(const ModelSpec& spec, const ModelWeights& weights, const Ops& ops) {
  Traffic traffic{.weights = static_cast<double>(weights.bytes() - weights.embedding->bytes())};
  for (const LayerSpec& layer : spec.layers) {
    if (layer.mixer == MixerKind::kGatedDeltaNet) {
      ++traffic.gdn_layers;
      traffic.state += static_cast<double>(layer.gdn.value_heads) * GdnHeadBytes(layer.gdn, ops.profile().gdn);
      continue;
    }
    const AttentionShape& shape = layer.attention;
    auto same = std::find_if(traffic.windows.begin(), traffic.windows.end(),
                             [&](const Traffic::Window& w) { return w.keys == shape.window; });
    if (same == traffic.windows.end())
      same = traffic.windows.insert(traffic.windows.end(), Traffic::Window{.keys = shape.window});
    const int64_t page = ops.kv_page_multiple();
    same->bytes += static_cast<double>(ops.KvPageBytes(shape, page)) / static_cast<double>(page);
    same->heads += shape.heads;
    same->flops += 4.0 * static_cast<double>(shape.heads * shape.head_dim);
    ++same->layers;
  }
  return traffic;
}

int64_t Traffic::attention_layers() const {
  int64_t layers = 0;
  for (const Window& w : windows) layers += w.layers;
  return layers;
}

double Traffic::KvBytes(int64_t context) const {
  double bytes = 0;
  for (const Window& w : windows)
    bytes += w.bytes * static_cast<double>(w.keys > 0 ? std::min(w.keys, context) : context);
  return bytes;
}

SharedAttentionBytes Traffic::SharedBytes(const SharedAttention& shared) const {
  SharedAttentionBytes bytes;
  for (const Window& w : windows) {
    const double states = static_cast<double>(w.heads * shared.state_bytes);  // of one row
    for (const AttentionShare& share : shared.shares) {
      const double keys = w.bytes * static_cast<double>(share.positions);
      // Rows whose window cuts the shared positions off go their own way; their columns are computed with the others'.
      const auto rows = std::count_if(share.row_positions.begin(), share.row_positions.end(),
                                      [&](int64_t position) { return w.keys == 0 || position < w.keys; });
      if (rows > 0) bytes.moved += keys + static_cast<double>(share.row_positions.size()) * states;
      bytes.spared += static_cast<double>(rows) * (keys - states);
    }
  }
  return bytes;
}

double Traffic::DecodeStepBytes(int64_t batch, int64_t context) const {
  return weights + static_cast<double>(batch) * (KvBytes(context) + state);
}

double Traffic::PromptAttentionFlops(int64_t tokens) const {
  double flops = 0;
  for (const Window& w : windows) {
    // Row i, from 1, sees min(i, window) keys.
    const double all = static_cast<double>(tokens),
                 seen = w.keys > 0 ? std::min(static_cast<double>(w.keys), all) : all;
    flops += w.flops * (seen * (seen + 1) / 2 + (all - seen) * seen);
  }
  return flops;
}

}  // namespace lockstep

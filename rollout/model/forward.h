// The forward pass over one step's batch: a list of layers from the spec, each a mixer and an MLP around the residual
// stream, all through Ops.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "rollout/model/spec.h"
#include "rollout/model/trace.h"
#include "rollout/model/weights.h"

namespace lockstep {

// Where each GDN layer's state lies inside a sequence's slot.
struct StateLayout {
  std::vector<int64_t> offsets;  // by layer; -1: not a GDN layer
  int64_t bytes = 0;             // of a slot; 0: the model has no GDN layer
};
StateLayout MakeStateLayout(const ModelSpec& spec, const Ops& ops);

// Bytes of KV that one page takes over all attention layers.
int64_t KvBytesPerPage(const ModelSpec& spec, const Ops& ops, int64_t page_size);

class ForwardPass {
 public:
  ~ForwardPass();
  // Allocates the activations of steps of at most `max_rows` rows. All arguments must outlive it.
  static absl::StatusOr<std::unique_ptr<ForwardPass>> Create(const ModelSpec& spec, const ModelWeights& weights,
                                                             Ops& ops, int64_t max_rows);
  // Bytes of the activations that Create would allocate.
  static int64_t BufferBytes(const ModelSpec& spec, const Ops& ops, int64_t max_rows);

  // The current batch of `ops`, computed over `rows` rows (what BeginStep returned). kv, states: by layer; entries of
  // the other kind are not read. Afterwards Logits() may be asked for.
  void Run(int64_t rows, std::span<const KvLayer> kv, std::span<const GdnLayer> states);

  // Final norm and head of the batch's logit rows [begin, begin + count): [count, vocab]. At most Ops::max_logit_rows()
  // at a time; the same memory each time.
  Rows Logits(int64_t begin, int64_t count);
  // Where Logits(..., count) puts its result.
  Rows logits(int64_t count) const;

  // Records every operation of the runs that follow; null: none.
  void set_trace(Trace* trace) { trace_ = trace; }

  int64_t max_rows() const { return max_rows_; }
  int64_t buffer_bytes() const { return memory_->bytes(); }

 private:
  ForwardPass(const ModelSpec& spec, const ModelWeights& weights, Ops& ops, int64_t max_rows);
  struct Buffers;
  // Rows [rows, width] in a buffer's memory.
  static Rows Take(const Rows& buffer, int64_t rows, int64_t width);
  void Record(int64_t layer, const char* name, Rows rows, const Trace::Parts& parts = {});
  void RecordResidual(int64_t layer, const char* name, Rows residual);
  // The residual stream as linear layers take it: itself, or rounded into `room`.
  Rows LinearInput(Rows residual, Rows room);
  void AttentionMixer(size_t layer, const AttentionWeights& weights, Rows in, const KvLayer& kv, Rows out);
  void GdnMixer(size_t layer, const GdnWeights& weights, Rows in, const GdnLayer& state, Rows out);
  void Mlp(size_t layer, const LayerWeights& weights, Rows in, Rows out);

  const ModelSpec& spec_;
  const ModelWeights& weights_;
  Ops& ops_;
  int64_t max_rows_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unique_ptr<Buffers> buffers_;
  Trace* trace_ = nullptr;
  std::vector<std::unique_ptr<VectorWeight>> inv_freq_;  // by layer; null: no RoPE
};

}  // namespace lockstep

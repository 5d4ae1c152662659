// Ops: every operation of the forward pass, as both backends implement it. Kernels know shapes and pointers, not
// models.
//
// The contract all implementations keep (docs/numerics.md): an output row depends on that row's inputs only, never on
// how many rows, pieces or sequences stand beside it, nor on threads. The order of a row's arithmetic is fixed; tiling
// is free.
//
// Activations live in the backend's own container: on CPU always fp32 words, holding values already rounded to
// `profile.activations`, or `profile.residual` (so a bf16 activation is a bf16 value in an fp32 word); on CUDA words of
// that dtype in device memory.
// All methods are called by one thread at a time, the step loop's; they may use all of the backend's threads inside, or
// return before the device has done the work: results on the host wait for Synchronize(). Shapes are CHECKed: a wrong
// shape here is a bug of the caller, not bad input. What the device itself reports goes to status().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "kernels/numerics.h"
#include "rollout/base/thread_pool.h"

namespace lockstep {

// A matrix of activations [rows, width] of `dtype`; row r begins at data + r * stride elements.
struct Rows {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
  int64_t stride = 0;
  DType dtype = DType::kF32;

  float* row(int64_t r) const { return static_cast<float*>(data) + r * stride; }  // kF32 only
  // Columns [begin, begin + count) of the same rows: how one operand is taken out of a fused projection's output.
  Rows columns(int64_t begin, int64_t count) const { return {At(begin), rows, count, stride, dtype}; }
  Rows slice(int64_t begin, int64_t count) const { return {At(begin * stride), count, width, stride, dtype}; }

 private:
  void* At(int64_t element) const { return static_cast<std::byte*>(data) + element * DTypeBytes(dtype); }
};

// A matrix as a checkpoint holds it: row-major [rows, cols] of `dtype`, in host memory.
struct HostMatrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  DType dtype = DType::kF32;
};

// A linear layer's weight in the backend's layout, [out, in]; made by Ops::PackLinear.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  virtual int64_t out_features() const = 0;
  virtual int64_t in_features() const = 0;
  virtual int64_t bytes() const = 0;
};

// An embedding table [vocab, hidden]; made by Ops::PackEmbedding or TieEmbedding.
class EmbeddingTable {
 public:
  virtual ~EmbeddingTable() = default;
  virtual int64_t vocab() const = 0;
  virtual int64_t hidden() const = 0;
  virtual int64_t bytes() const = 0;  // of its own; 0 when tied
};

// A small weight of a norm, a convolution or a gate; made by Ops::PackVector.
class VectorWeight {
 public:
  virtual ~VectorWeight() = default;
  virtual const void* data() const = 0;  // [size] of dtype()
  virtual int64_t size() const = 0;
  virtual DType dtype() const = 0;
  const float* floats() const { return static_cast<const float*>(data()); }  // kF32 only
  int64_t bytes() const { return size() * DTypeBytes(dtype()); }
};

// Memory of the backend's device, given back with the object.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual std::byte* data() const = 0;
  virtual int64_t bytes() const = 0;
};

// The rows of one sequence inside a step's batch: rows [row_begin, row_begin + row_count) are its positions [position,
// position + row_count).
struct Piece {
  int64_t row_begin = 0;
  int64_t row_count = 0;
  int64_t position = 0;
  std::byte* gdn_state = nullptr;       // set by a backend that works from host pointers; see GdnLayer
  const int32_t* page_table = nullptr;  // [ceil((position + row_count) / page_size)] page ids (attention layers)
  int32_t slot = 0;                     // of the sequence's state
};

// One step's rows. Host memory; read by BeginStep.
struct StepBatch {
  std::span<const int32_t> tokens;      // [rows], in [0, vocab)
  std::span<const int64_t> positions;   // [rows]
  std::span<const Piece> pieces;        // in ascending order of rows, covering all of them
  std::span<const int64_t> logit_rows;  // ascending; the rows whose logits will be asked for
  int64_t page_size = 0;                // positions of a KV page; 0: no page tables
};

struct GdnShape {
  int64_t key_heads = 0;
  int64_t value_heads = 0;  // a multiple of key_heads; value head h reads key head h / (value_heads / key_heads)
  int64_t key_dim = 0;      // d_k, per head
  int64_t value_dim = 0;    // d_v, per head
  int64_t conv_width = 4;

  int64_t key_width() const { return key_heads * key_dim; }
  int64_t value_width() const { return value_heads * value_dim; }
  int64_t conv_channels() const { return 2 * key_width() + value_width(); }
};

struct AttentionShape {
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads; query head h reads kv head h / (heads / kv_heads)
  int64_t head_dim = 0;
  int64_t window = 0;  // keys visible to position i: j <= i and, if window > 0, j > i - window
  float scale = 0;
};

// One layer's paged keys and values. Layout is the backend's own; a page holds `page_size` positions of all kv heads,
// keys and values.
struct KvLayer {
  std::byte* base = nullptr;  // page p begins at base + p * Ops::KvPageBytes(...)
  int64_t page_size = 0;      // positions; a multiple of Ops::kv_page_multiple()
  int64_t page_count = 0;
};

// How much of a step to compute, padding included.
struct StepRows {
  int64_t rows = 0;        // at least the batch's
  int64_t logit_rows = 0;  // of the first block of logits, at most Ops::max_logit_rows()
};

// Decode rows of a step whose first keys and values attention reads once for all of them.
struct AttentionShare {
  int64_t positions = 0;               // so many, at the front of every row
  std::vector<int64_t> row_positions;  // of two rows or more
};
struct SharedAttention {
  std::vector<AttentionShare> shares;
  int64_t state_bytes = 0;  // what a row's query head goes on from after the shared ones; written, and read, a layer
};

// One GDN layer's states: that of slot s begins at base + s * slot_stride.
struct GdnLayer {
  std::byte* base = nullptr;
  int64_t slot_stride = 0;  // bytes
};

// The gates of a GDN layer: beta = sigmoid(b) (times 2 if neg_eigval; rounded after each), g = -exp(a_log) *
// softplus(a + dt_bias) in fp32.
struct GdnGates {
  Rows a;  // [rows, value_heads], as b and beta
  Rows b;
  const VectorWeight& a_log;    // [value_heads], exact
  const VectorWeight& dt_bias;  // [value_heads], exact
  bool neg_eigval = false;
  Rows beta;
  Rows g;  // [rows, value_heads] in fp32
};

constexpr int64_t kGdnChunk = 64;

// Where new weights go: room on the device beside those in use, or (LiveWeights) the place of those in use. Used by one
// thread at a time, which may be another than the step loop's.
class WeightStage {
 public:
  virtual ~WeightStage() = default;
  virtual int64_t bytes() const = 0;
  // `data`, whole values of one tensor, is free on return.
  virtual absl::Status Write(int64_t offset, std::span<const std::byte> data) = 0;
  // All that was written is there.
  virtual absl::Status Finish() = 0;
  // The device's address of bytes of one tensor; null where its values do not lie there row by row, so that only Write
  // reaches them.
  virtual std::byte* Address(int64_t offset, int64_t bytes) = 0;
};

// A tensor among the weights in use: one of the three is set.
struct WeightPlace {
  LinearWeight* linear = nullptr;  // rows from first_row on
  int64_t first_row = 0;
  EmbeddingTable* embedding = nullptr;
  VectorWeight* vector = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;           // 1 for a vector
  DType dtype = DType::kF32;  // in which the weight is held
  int64_t offset = 0;         // of its first byte, in what Write, Address and Read call offset

  int64_t bytes() const { return rows * cols * DTypeBytes(dtype); }
};

// The weights in use, addressed as a stage is. No step may run from the first Write, or the first use of an Address, to
// the Finish after the last.
class LiveWeights : public WeightStage {
 public:
  // Whole values of one tensor, as they are in use; waits for them. By any one thread, while nothing is written; steps
  // may run.
  virtual absl::Status Read(int64_t offset, std::span<std::byte> to) = 0;
  // DigestSum (kernels/digest_math.h) of what Read would give, computed where the values are. While no step runs.
  virtual absl::StatusOr<uint64_t> SumInUse(int64_t offset, int64_t bytes, uint64_t first_word) = 0;
};

// Values of one tensor in an inbox, on their way into a stage. Indices of values are multiples of 4, and so is `count`
// unless the tensor and its place in the stage end with it.
struct InboxValues {
  const std::byte* from = nullptr;  // in the inbox, aligned to 16 bytes
  DType sent = DType::kF32;
  int64_t count = 0;
  int64_t sent_index = 0;      // of the first value in the tensor as it was sent
  int64_t held_index = 0;      // of the first value in what digests of held values count
  DType held = DType::kF32;    // rounded to this first, to nearest and ties to even
  int64_t to = 0;              // offset in the stage, in bytes; its address is aligned to 8
  DType stored = DType::kF32;  // there; holds every value of `held`
  int64_t tally = -1;          // to which the values count; -1: none
};

// Sums over a tensor's values: weights_sync/digest.h says of what.
struct ValueTally {
  uint64_t sent_sum = 0;  // of the words as sent, and as held
  uint64_t held_sum = 0;
  uint64_t non_finite = 0;  // NaNs and infinities as sent
};

// Two buffers in the device's memory that a transport (NCCL) fills while steps run, and the way from there into a
// stage. In turn, for each buffer: Acquire, the transport's work on stream(), Arrived, Store..., Release. Used by one
// thread at a time, which may be another than the step loop's. Nothing waits unless it says so.
class WeightInbox {
 public:
  virtual ~WeightInbox() = default;
  virtual int64_t buffer_bytes() const = 0;
  virtual std::byte* buffer(int which) = 0;
  // A cudaStream_t; null: host memory, where the transport's work is done when its call is.
  virtual void* stream() = 0;
  // Makes the device the calling thread's, for a transport that works on the current one.
  virtual absl::Status UseOnThisThread() = 0;

  // Waits until nothing is under way and sets the tallies to zero.
  virtual absl::Status Reset() = 0;
  // What the transport does next on stream() comes after the buffer's last Release.
  virtual absl::Status Acquire(int which) = 0;
  // What is stored next comes after what the transport has been asked for on stream().
  virtual absl::Status Arrived() = 0;
  virtual absl::Status Store(const InboxValues& values, WeightStage& stage) = 0;
  virtual absl::Status Release(int which) = 0;
  // Whether all that was asked for, on stream() too, has happened.
  virtual absl::StatusOr<bool> Idle() = 0;
  // Once it is idle.
  virtual absl::StatusOr<std::vector<ValueTally>> Tallies() = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  virtual const NumericsProfile& profile() const = 0;
  virtual ThreadPool& threads() = 0;

  // Makes the device the calling thread's. Whoever calls the methods below from a thread that did not make this object
  // calls it first: a CUDA device is current by thread.
  virtual absl::Status UseOnThisThread() = 0;

  // The first error of the device since the last call of status(), with the operation's name; after one, results of the
  // step mean nothing.
  virtual absl::Status status() = 0;
  // Waits until everything asked for has happened.
  virtual void Synchronize() = 0;
  // Whether operations are only asked for, and happen while the caller goes on.
  virtual bool runs_by_itself() const = 0;

  // What may still be taken of the device's memory, in bytes, beside what the backend keeps back for itself.
  virtual int64_t AvailableMemory() const = 0;
  virtual int64_t reserved_memory() const = 0;
  // Zeroed, 256-byte aligned. RESOURCE_EXHAUSTED if there is not as much.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(int64_t bytes) = 0;
  // Within the device, ordered with the operations.
  virtual void Copy(std::byte* to, const std::byte* from, int64_t bytes) = 0;
  // Between the device and host memory, ordered with the operations; they wait.
  virtual void CopyToHost(std::byte* to, const std::byte* from, int64_t bytes) = 0;
  virtual void CopyFromHost(std::byte* to, const std::byte* from, int64_t bytes) = 0;
  // To host memory: [rows, width] as fp32, with no gaps. Waits.
  virtual std::vector<float> Download(Rows rows) = 0;

  // Container of activations, and of what stays fp32 whatever the profile (g).
  virtual DType activation_dtype() const = 0;
  virtual DType residual_dtype() const = 0;
  virtual DType logit_dtype() const = 0;
  // Rows of logits worth computing at a time.
  virtual int64_t max_logit_rows() const = 0;

  // Stacks `parts` (same cols) along the output dimension, converts to profile().weights and packs. Output column order
  // is the parts' row order. RESOURCE_EXHAUSTED if the device's memory does not suffice.
  virtual absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(std::span<const HostMatrix> parts) = 0;
  virtual absl::StatusOr<std::unique_ptr<EmbeddingTable>> PackEmbedding(const HostMatrix& table) = 0;
  // The table that is the head's weight (tied embeddings), in the head's memory. The head must outlive its use.
  virtual std::unique_ptr<EmbeddingTable> TieEmbedding(const LinearWeight& head) = 0;
  // `exact`: kept in fp32 whatever the profile; else values are exact in profile().weights and may be held in it.
  virtual absl::StatusOr<std::unique_ptr<VectorWeight>> PackVector(std::span<const float> values, bool exact) = 0;

  // RESOURCE_EXHAUSTED if there is not as much memory.
  virtual absl::StatusOr<std::unique_ptr<WeightStage>> MakeWeightStage(int64_t bytes) = 0;
  // `places` in ascending order of offset, without overlap; their weights must outlive it.
  virtual absl::StatusOr<std::unique_ptr<LiveWeights>> MakeLiveWeights(std::span<const WeightPlace> places) = 0;
  // Two buffers of buffer_bytes (a multiple of 256) and `tallies` tallies. RESOURCE_EXHAUSTED if there is not as much
  // memory.
  virtual absl::StatusOr<std::unique_ptr<WeightInbox>> MakeWeightInbox(int64_t buffer_bytes, int64_t tallies) = 0;
  // Put rows [first_row, first_row + from.rows) of a weight in the place of those in use: addresses stay as they are.
  // `from` is in the stage, in the dtype in which the weight is held.
  virtual void StoreLinear(const HostMatrix& from, int64_t first_row, LinearWeight& to) = 0;
  virtual void StoreEmbedding(const HostMatrix& from, EmbeddingTable& to) = 0;
  // [to.size()] values of to.dtype().
  virtual void StoreVector(const std::byte* from, VectorWeight& to) = 0;

  // Begins a step: the operations below that depend on sequences work on this batch until the next call. Returns how
  // much to compute: a backend that replays recorded steps pads to a size it has; what it computes in the padding goes
  // nowhere.
  virtual StepRows BeginStep(const StepBatch& batch) = 0;
  // Runs `step`, which asks for the same operations on the same memory each time for the same owner and StepRows: a
  // backend may record and replay them instead.
  virtual void RunStep(const void* owner, absl::FunctionRef<void()> step) = 0;
  // The owner's memory is about to go.
  virtual void ForgetSteps(const void* owner) = 0;
  // What decode attention of the step begun last reads together, in layers whose kernels do and whose window holds it.
  virtual SharedAttention shared_attention() const { return {}; }

  // out[r] = table[tokens[r]], of the batch, rounded to profile().residual.
  virtual void Embed(const EmbeddingTable& table, Rows out) = 0;
  // out[i] = x[batch.logit_rows[begin + i]], i < out.rows, both of the residual stream; rows past the batch's count
  // mean nothing.
  virtual void GatherLogitRows(Rows x, int64_t begin, Rows out) = 0;

  // out = the residual stream x rounded to profile().activations: what a linear layer takes of it.
  virtual void RoundResidual(Rows x, Rows out) = 0;

  // out = x W^T, rounded to profile().activations. Each output is one fp32 accumulator over ascending k.
  virtual void Linear(Rows x, const LinearWeight& weight, Rows out) = 0;
  // The same, rounded to profile().logits.
  virtual void Logits(Rows x, const LinearWeight& weight, Rows out) = 0;

  // out = x / sqrt(mean(x^2) + eps) * weight; fp32 inside, one rounding, to profile().activations. weight: [width]. x
  // may be of the residual stream; else out may be x.
  virtual void RmsNorm(Rows x, const VectorWeight& weight, float eps, Rows out) = 0;
  // residual = residual + x, rounded to profile().residual; out = RmsNorm(residual). Pre-norm layers.
  virtual void AddRmsNorm(Rows x, Rows residual, const VectorWeight& weight, float eps, Rows out) = 0;
  // residual = residual + RmsNorm(x), rounded to profile().residual. Post-norm layers.
  virtual void RmsNormAdd(Rows x, const VectorWeight& weight, float eps, Rows residual) = 0;
  // residual = residual + x, rounded to profile().residual.
  virtual void Add(Rows x, Rows residual) = 0;

  // out = silu(gate) * up with silu rounded first; gate_up: [rows, 2 * out.width], gate in the first half.
  virtual void SwiGlu(Rows gate_up, Rows out) = 0;
  // out = SwiGlu(Linear(x, gate_up)), with the bits of the two. room: [rows, 2 * out.width], which means nothing
  // afterwards.
  virtual void LinearSwiGlu(Rows x, const LinearWeight& gate_up, Rows room, Rows out) = 0;

  // Rotates pairs (i, i + head_dim / 2) of every head of q and k in place, as HF's rotate_half: angle = position *
  // inv_freq[i], in fp32; cos and sin are multiplied by `attention_scaling`. inv_freq: [head_dim / 2], exact.
  virtual void Rope(Rows q, Rows k, const VectorWeight& inv_freq, float attention_scaling, int64_t head_dim) = 0;

  // A page's positions must be a multiple of this.
  virtual int64_t kv_page_multiple() const = 0;
  // Bytes of one layer's page. Pages are multiples of 64 bytes.
  virtual int64_t KvPageBytes(const AttentionShape& shape, int64_t page_size) const = 0;
  // Stores k, v [rows, kv_heads * head_dim] of every piece into its pages.
  virtual void WriteKv(Rows k, Rows v, const AttentionShape& shape, const KvLayer& kv) = 0;
  // out [rows, heads * head_dim]: causal attention of each row over positions [0, its own] of its sequence, all already
  // in the pages.
  virtual void Attention(Rows q, const AttentionShape& shape, const KvLayer& kv, Rows out) = 0;

  // Bytes of one GDN layer's state for one sequence: convolution tail, FP32 state at the last chunk boundary, and the
  // open chunk's rows. A multiple of 64.
  virtual int64_t GdnStateBytes(const GdnShape& shape) const = 0;
  // Makes the slot's state that of a sequence with no tokens.
  virtual void GdnResetState(const GdnShape& shape, const GdnLayer& layer, int32_t slot) = 0;

  // What the chunk program takes, of one fused projection: causal depthwise convolution (width conv_width, over
  // channels [q | k | v]) and SiLU, from and into the state's convolution tail; and the gates. in, out: [rows,
  // conv_channels]; weight: [conv_channels, conv_width], oldest tap first. out must not overlap in. q and k are
  // l2-normalised here if normalises_in_conv(), else in GdnChunk.
  virtual void GdnConvAndGates(Rows in, const VectorWeight& weight, const GdnShape& shape, const GdnLayer& layer,
                               Rows out, const GdnGates& gates) = 0;
  virtual bool normalises_in_conv() const = 0;
  // The chunk program. qkv: [rows, conv_channels], GdnConvAndGates' output; q is scaled by key_dim^-0.5. out: [rows,
  // value_width]. Positions of a piece continue where the state stands.
  virtual void GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out) = 0;
  // GdnChunk, then GatedRmsNorm of its output with heads of value_dim columns; only the norm's output is kept. gate:
  // [rows, value_width]; norm: [value_dim].
  virtual void GdnChunkNorm(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows gate,
                            const VectorWeight& norm, float eps, Rows out) = 0;
  // out = x / sqrt(mean(x^2) + eps) * weight * silu(gate), per head of head_dim columns. weight: [head_dim]. out may be
  // x.
  virtual void GatedRmsNorm(Rows x, Rows gate, const VectorWeight& weight, float eps, int64_t head_dim, Rows out) = 0;
};

// The CPU backend (Highway; best instruction set at run time). `threads` must outlive it.
std::unique_ptr<Ops> MakeCpuOps(const NumericsProfile& profile, ThreadPool* threads);

}  // namespace lockstep

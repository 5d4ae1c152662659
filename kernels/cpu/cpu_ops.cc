#include "kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/embedding.h"
#include "kernels/cpu/gated_rms_norm.h"
#include "kernels/cpu/gdn_chunk.h"
#include "kernels/cpu/gdn_conv.h"
#include "kernels/cpu/gdn_gates.h"
#include "kernels/cpu/gdn_state.h"
#include "kernels/cpu/kv_cache.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/live_weights.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cpu/rope.h"
#include "kernels/cpu/swiglu.h"
#include "kernels/cpu/weight_stage.h"
#include "rollout/base/check.h"
#include "rollout/base/memory.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

class CpuMemory final : public DeviceMemory {
 public:
  explicit CpuMemory(Arena arena) : arena_(std::move(arena)) {}
  std::byte* data() const override { return arena_.data(); }
  int64_t bytes() const override { return arena_.bytes(); }

 private:
  Arena arena_;
};

class CpuVector final : public VectorWeight {
 public:
  explicit CpuVector(std::span<const float> values) : values_(values.begin(), values.end()) {}
  const void* data() const override { return values_.data(); }
  int64_t size() const override { return static_cast<int64_t>(values_.size()); }
  DType dtype() const override { return DType::kF32; }
  float* values() { return values_.data(); }

 private:
  std::vector<float> values_;
};

}  // namespace

CpuOps::CpuOps(const NumericsProfile& profile, ThreadPool* threads)
    : profile_(profile), scratch_(threads->threads()), context_{profile_, *threads, scratch_} {
  // HWY_TARGETS holds only targets with fused multiply-add; without one of them the bits of every linear layer would
  // differ.
  LOCKSTEP_CHECK((hwy::SupportedTargets() & HWY_TARGETS) != 0,
                 "the CPU backend needs a CPU with AVX2, FMA, BMI2 and F16C (x86-64), or Arm64 NEON");
  LOCKSTEP_CHECK(profile_.weights != DType::kF16 && profile_.activations != DType::kF16 && profile_.kv != DType::kF16 &&
                     profile_.logits != DType::kF16 && profile_.attention_p != DType::kF16,
                 "profile {}: the CPU backend computes in bfloat16 or float32, not float16", profile_.name);
}

int64_t CpuOps::AvailableMemory() const {
  return lockstep::AvailableMemory();
}
absl::StatusOr<std::unique_ptr<DeviceMemory>> CpuOps::Allocate(int64_t bytes) {
  LOCKSTEP_ASSIGN_OR_RETURN(Arena arena, Arena::Map(bytes));
  return std::make_unique<CpuMemory>(std::move(arena));
}
void CpuOps::CopyToHost(std::byte* to, const std::byte* from, int64_t bytes) {
  std::memcpy(to, from, bytes);
}
void CpuOps::CopyFromHost(std::byte* to, const std::byte* from, int64_t bytes) {
  std::memcpy(to, from, bytes);
}
void CpuOps::Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  std::memcpy(to, from, bytes);
}
std::vector<float> CpuOps::Download(Rows rows) {
  std::vector<float> values;
  for (int64_t r = 0; r < rows.rows; ++r) values.insert(values.end(), rows.row(r), rows.row(r) + rows.width);
  return values;
}

absl::StatusOr<std::unique_ptr<LinearWeight>> CpuOps::PackLinear(std::span<const HostMatrix> parts) {
  return CpuPackLinear(context_, parts);
}
absl::StatusOr<std::unique_ptr<EmbeddingTable>> CpuOps::PackEmbedding(const HostMatrix& table) {
  return CpuPackEmbedding(context_, table);
}
std::unique_ptr<EmbeddingTable> CpuOps::TieEmbedding(const LinearWeight& head) {
  return CpuTieEmbedding(head);
}
absl::StatusOr<std::unique_ptr<VectorWeight>> CpuOps::PackVector(std::span<const float> values, bool) {
  return std::make_unique<CpuVector>(values);
}

absl::StatusOr<std::unique_ptr<WeightStage>> CpuOps::MakeWeightStage(int64_t bytes) {
  LOCKSTEP_ASSIGN_OR_RETURN(Arena arena, Arena::Map(bytes));
  return std::make_unique<CpuWeightStage>(std::move(arena));
}
absl::StatusOr<std::unique_ptr<LiveWeights>> CpuOps::MakeLiveWeights(std::span<const WeightPlace> places) {
  std::vector<CpuWeightPlace> found;
  for (const WeightPlace& place : places) {
    CpuWeightPlace& to = found.emplace_back();
    to = {.offset = place.offset, .bytes = place.bytes(), .first_row = place.first_row, .dtype = place.dtype};
    if (place.linear != nullptr) {
      to.linear = static_cast<CpuLinearWeight*>(place.linear);
    } else if (place.embedding != nullptr) {
      to.memory = CpuEmbeddingMemory(*place.embedding);
    } else {
      to.memory = reinterpret_cast<std::byte*>(static_cast<CpuVector&>(*place.vector).values());
    }
  }
  return std::make_unique<CpuLiveWeights>(context_, std::move(found));
}
absl::StatusOr<std::unique_ptr<WeightInbox>> CpuOps::MakeWeightInbox(int64_t buffer_bytes, int64_t tallies) {
  return CpuWeightInbox::Create(buffer_bytes, tallies);
}
void CpuOps::StoreLinear(const HostMatrix& from, int64_t first_row, LinearWeight& to) {
  CpuStoreLinear(context_, from, first_row, static_cast<CpuLinearWeight&>(to));
}
void CpuOps::StoreEmbedding(const HostMatrix& from, EmbeddingTable& to) {
  CpuStoreEmbedding(context_, from, to);
}
void CpuOps::StoreVector(const std::byte* from, VectorWeight& to) {
  std::memcpy(static_cast<CpuVector&>(to).values(), from, to.bytes());
}

StepRows CpuOps::BeginStep(const StepBatch& batch) {
  batch_ = batch;
  return {static_cast<int64_t>(batch.tokens.size()),
          std::min(static_cast<int64_t>(batch.logit_rows.size()), max_logit_rows())};
}
std::span<const Piece> CpuOps::PiecesOf(const GdnLayer& layer) {
  pieces_.assign(batch_.pieces.begin(), batch_.pieces.end());
  for (Piece& piece : pieces_) piece.gdn_state = layer.base + piece.slot * layer.slot_stride;
  return pieces_;
}

void CpuOps::Embed(const EmbeddingTable& table, Rows out) {
  CpuEmbed(context_, batch_.tokens, table, out);
}
void CpuOps::GatherLogitRows(Rows x, int64_t begin, Rows out) {
  for (int64_t i = 0; i < out.rows; ++i)
    std::memcpy(out.row(i), x.row(batch_.logit_rows[begin + i]), x.width * sizeof(float));
}
void CpuOps::RoundResidual(Rows x, Rows out) {
  CpuRoundResidual(context_, x, out);
}
void CpuOps::Linear(Rows x, const LinearWeight& weight, Rows out) {
  CpuLinear(context_, x, weight, out);
}
void CpuOps::Logits(Rows x, const LinearWeight& weight, Rows out) {
  CpuLogits(context_, x, weight, out);
}
void CpuOps::RmsNorm(Rows x, const VectorWeight& weight, float eps, Rows out) {
  CpuRmsNorm(context_, x, weight.floats(), eps, out);
}
void CpuOps::AddRmsNorm(Rows x, Rows residual, const VectorWeight& weight, float eps, Rows out) {
  CpuAddRmsNorm(context_, x, residual, weight.floats(), eps, out);
}
void CpuOps::RmsNormAdd(Rows x, const VectorWeight& weight, float eps, Rows residual) {
  CpuRmsNormAdd(context_, x, weight.floats(), eps, residual);
}
void CpuOps::Add(Rows x, Rows residual) {
  CpuAdd(context_, x, residual);
}
void CpuOps::SwiGlu(Rows gate_up, Rows out) {
  CpuSwiGlu(context_, gate_up, out);
}
void CpuOps::LinearSwiGlu(Rows x, const LinearWeight& gate_up, Rows room, Rows out) {
  Linear(x, gate_up, room);
  SwiGlu(room, out);
}
void CpuOps::Rope(Rows q, Rows k, const VectorWeight& inv_freq, float attention_scaling, int64_t head_dim) {
  const std::span<const float> frequencies(inv_freq.floats(), static_cast<size_t>(inv_freq.size()));
  CpuRope(context_, q, batch_.positions, frequencies, attention_scaling, head_dim);
  CpuRope(context_, k, batch_.positions, frequencies, attention_scaling, head_dim);
}
int64_t CpuOps::KvPageBytes(const AttentionShape& shape, int64_t page_size) const {
  return CpuKvPageBytes(context_, shape, page_size);
}
void CpuOps::WriteKv(Rows k, Rows v, const AttentionShape& shape, const KvLayer& kv) {
  CpuWriteKv(context_, k, v, shape, batch_.pieces, kv);
}
void CpuOps::Attention(Rows q, const AttentionShape& shape, const KvLayer& kv, Rows out) {
  CpuAttention(context_, q, shape, batch_.pieces, kv, out);
}
int64_t CpuOps::GdnStateBytes(const GdnShape& shape) const {
  return CpuGdnStateBytes(context_, shape);
}
void CpuOps::GdnResetState(const GdnShape& shape, const GdnLayer& layer, int32_t slot) {
  CpuGdnResetState(context_, shape, layer.base + slot * layer.slot_stride);
}
void CpuOps::GdnConvAndGates(Rows in, const VectorWeight& weight, const GdnShape& shape, const GdnLayer& layer,
                             Rows out, const GdnGates& gates) {
  CpuGdnConv(context_, in, weight.floats(), shape, PiecesOf(layer), out);
  CpuGdnGates(context_, gates.a, gates.b, gates.a_log.floats(), gates.dt_bias.floats(), gates.neg_eigval, gates.beta,
              gates.g);
}
void CpuOps::GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out) {
  CpuGdnChunk(context_, qkv, beta, g, shape, PiecesOf(layer), out);
}
void CpuOps::GdnChunkNorm(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows gate,
                          const VectorWeight& norm, float eps, Rows out) {
  GdnChunk(qkv, beta, g, shape, layer, out);
  GatedRmsNorm(out, gate, norm, eps, shape.value_dim, out);
}
void CpuOps::GatedRmsNorm(Rows x, Rows gate, const VectorWeight& weight, float eps, int64_t head_dim, Rows out) {
  CpuGatedRmsNorm(context_, x, gate, weight.floats(), eps, head_dim, out);
}

std::unique_ptr<Ops> MakeCpuOps(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<CpuOps>(profile, threads);
}

}  // namespace lockstep

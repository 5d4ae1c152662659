#include "kernels/cpu/cpu_ops.h"

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
#include "kernels/cpu/rms_norm.h"
#include "kernels/cpu/rope.h"
#include "kernels/cpu/swiglu.h"
#include "rollout/base/check.h"

namespace lockstep {

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

std::unique_ptr<LinearWeight> CpuOps::PackLinear(std::span<const HostMatrix> parts) {
  return CpuPackLinear(context_, parts);
}
std::unique_ptr<EmbeddingTable> CpuOps::PackEmbedding(const HostMatrix& table) {
  return CpuPackEmbedding(context_, table);
}
void CpuOps::Embed(std::span<const int32_t> tokens, const EmbeddingTable& table, Rows out) {
  CpuEmbed(context_, tokens, table, out);
}
void CpuOps::Linear(Rows x, const LinearWeight& weight, Rows out) {
  CpuLinear(context_, x, weight, out);
}
void CpuOps::Logits(Rows x, const LinearWeight& weight, Rows out) {
  CpuLogits(context_, x, weight, out);
}
void CpuOps::RmsNorm(Rows x, const float* weight, float eps, Rows out) {
  CpuRmsNorm(context_, x, weight, eps, out);
}
void CpuOps::AddRmsNorm(Rows x, Rows residual, const float* weight, float eps, Rows out) {
  CpuAddRmsNorm(context_, x, residual, weight, eps, out);
}
void CpuOps::RmsNormAdd(Rows x, const float* weight, float eps, Rows residual) {
  CpuRmsNormAdd(context_, x, weight, eps, residual);
}
void CpuOps::Add(Rows x, Rows residual) {
  CpuAdd(context_, x, residual);
}
void CpuOps::SwiGlu(Rows gate_up, Rows out) {
  CpuSwiGlu(context_, gate_up, out);
}
void CpuOps::Rope(Rows x, std::span<const int64_t> positions, std::span<const float> inv_freq, float attention_scaling,
                  int64_t head_dim) {
  CpuRope(context_, x, positions, inv_freq, attention_scaling, head_dim);
}
int64_t CpuOps::KvPageBytes(const AttentionShape& shape, int64_t page_size) const {
  return CpuKvPageBytes(context_, shape, page_size);
}
void CpuOps::WriteKv(Rows k, Rows v, const AttentionShape& shape, std::span<const Piece> pieces, const KvLayer& kv) {
  CpuWriteKv(context_, k, v, shape, pieces, kv);
}
void CpuOps::Attention(Rows q, const AttentionShape& shape, std::span<const Piece> pieces, const KvLayer& kv,
                       Rows out) {
  CpuAttention(context_, q, shape, pieces, kv, out);
}
int64_t CpuOps::GdnStateBytes(const GdnShape& shape) const {
  return CpuGdnStateBytes(context_, shape);
}
void CpuOps::GdnResetState(const GdnShape& shape, std::byte* state) {
  CpuGdnResetState(context_, shape, state);
}
void CpuOps::GdnConv(Rows in, const float* weight, const GdnShape& shape, std::span<const Piece> pieces, Rows out) {
  CpuGdnConv(context_, in, weight, shape, pieces, out);
}
void CpuOps::GdnGates(Rows a, Rows b, const float* a_log, const float* dt_bias, bool neg_eigval, Rows beta, Rows g) {
  CpuGdnGates(context_, a, b, a_log, dt_bias, neg_eigval, beta, g);
}
void CpuOps::GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, std::span<const Piece> pieces, Rows out) {
  CpuGdnChunk(context_, qkv, beta, g, shape, pieces, out);
}
void CpuOps::GatedRmsNorm(Rows x, Rows gate, const float* weight, float eps, int64_t head_dim, Rows out) {
  CpuGatedRmsNorm(context_, x, gate, weight, eps, head_dim, out);
}

std::unique_ptr<Ops> MakeCpuOps(const NumericsProfile& profile, ThreadPool* threads) {
  return std::make_unique<CpuOps>(profile, threads);
}

}  // namespace lockstep

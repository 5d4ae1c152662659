// CpuOps: the CPU backend as one object. Every method forwards to the free function of its operation, which lives in a
// file of its own.
#pragma once

#include <memory>
#include <span>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

class CpuOps final : public Ops {
 public:
  CpuOps(const NumericsProfile& profile, ThreadPool* threads);

  const NumericsProfile& profile() const override { return profile_; }
  ThreadPool& threads() override { return context_.threads; }

  std::unique_ptr<LinearWeight> PackLinear(std::span<const HostMatrix> parts) override;
  std::unique_ptr<EmbeddingTable> PackEmbedding(const HostMatrix& table) override;
  void Embed(std::span<const int32_t> tokens, const EmbeddingTable& table, Rows out) override;
  void Linear(Rows x, const LinearWeight& weight, Rows out) override;
  void Logits(Rows x, const LinearWeight& weight, Rows out) override;
  void RmsNorm(Rows x, const float* weight, float eps, Rows out) override;
  void AddRmsNorm(Rows x, Rows residual, const float* weight, float eps, Rows out) override;
  void RmsNormAdd(Rows x, const float* weight, float eps, Rows residual) override;
  void Add(Rows x, Rows residual) override;
  void SwiGlu(Rows gate_up, Rows out) override;
  void Rope(Rows x, std::span<const int64_t> positions, std::span<const float> inv_freq, float attention_scaling,
            int64_t head_dim) override;
  int64_t KvPageBytes(const AttentionShape& shape, int64_t page_size) const override;
  void WriteKv(Rows k, Rows v, const AttentionShape& shape, std::span<const Piece> pieces, const KvLayer& kv) override;
  void Attention(Rows q, const AttentionShape& shape, std::span<const Piece> pieces, const KvLayer& kv,
                 Rows out) override;
  int64_t GdnStateBytes(const GdnShape& shape) const override;
  void GdnResetState(const GdnShape& shape, std::byte* state) override;
  void GdnConv(Rows in, const float* weight, const GdnShape& shape, std::span<const Piece> pieces, Rows out) override;
  void GdnGates(Rows a, Rows b, const float* a_log, const float* dt_bias, bool neg_eigval, Rows beta, Rows g) override;
  void GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, std::span<const Piece> pieces, Rows out) override;
  void GatedRmsNorm(Rows x, Rows gate, const float* weight, float eps, int64_t head_dim, Rows out) override;

 private:
  const NumericsProfile profile_;
  ThreadScratch scratch_;
  const CpuContext context_;
};

}  // namespace lockstep

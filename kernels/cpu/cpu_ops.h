// CpuOps: the CPU backend as one object. Every method forwards to the free function of its operation, which lives in a
// file of its own.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/cpu/context.h"
#include "kernels/ops.h"

namespace lockstep {

class CpuOps : public Ops {
 public:
  CpuOps(const NumericsProfile& profile, ThreadPool* threads);

  const NumericsProfile& profile() const override { return profile_; }
  ThreadPool& threads() override { return context_.threads; }
  absl::Status status() override { return absl::OkStatus(); }
  void Synchronize() override {}
  absl::Status UseOnThisThread() override { return absl::OkStatus(); }
  bool runs_by_itself() const override { return false; }

  int64_t AvailableMemory() const override;
  int64_t reserved_memory() const override { return 0; }
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(int64_t bytes) override;
  void Copy(std::byte* to, const std::byte* from, int64_t bytes) override;
  void CopyToHost(std::byte* to, const std::byte* from, int64_t bytes) override;
  void CopyFromHost(std::byte* to, const std::byte* from, int64_t bytes) override;
  std::vector<float> Download(Rows rows) override;
  DType activation_dtype() const override { return DType::kF32; }
  DType residual_dtype() const override { return DType::kF32; }
  DType logit_dtype() const override { return DType::kF32; }
  int64_t max_logit_rows() const override { return 64; }

  absl::StatusOr<std::unique_ptr<LinearWeight>> PackLinear(std::span<const HostMatrix> parts) override;
  absl::StatusOr<std::unique_ptr<EmbeddingTable>> PackEmbedding(const HostMatrix& table) override;
  std::unique_ptr<EmbeddingTable> TieEmbedding(const LinearWeight& head) override;
  absl::StatusOr<std::unique_ptr<VectorWeight>> PackVector(std::span<const float> values, bool exact) override;

  absl::StatusOr<std::unique_ptr<WeightStage>> MakeWeightStage(int64_t bytes) override;
  absl::StatusOr<std::unique_ptr<LiveWeights>> MakeLiveWeights(std::span<const WeightPlace> places) override;
  absl::StatusOr<std::unique_ptr<WeightInbox>> MakeWeightInbox(int64_t buffer_bytes, int64_t tallies) override;
  void StoreLinear(const HostMatrix& from, int64_t first_row, LinearWeight& to) override;
  void StoreEmbedding(const HostMatrix& from, EmbeddingTable& to) override;
  void StoreVector(const std::byte* from, VectorWeight& to) override;

  StepRows BeginStep(const StepBatch& batch) override;
  void RunStep(const void*, absl::FunctionRef<void()> step) override { step(); }
  void ForgetSteps(const void*) override {}

  void Embed(const EmbeddingTable& table, Rows out) override;
  void GatherLogitRows(Rows x, int64_t begin, Rows out) override;
  void RoundResidual(Rows x, Rows out) override;
  void Linear(Rows x, const LinearWeight& weight, Rows out) override;
  void Logits(Rows x, const LinearWeight& weight, Rows out) override;
  void RmsNorm(Rows x, const VectorWeight& weight, float eps, Rows out) override;
  void AddRmsNorm(Rows x, Rows residual, const VectorWeight& weight, float eps, Rows out) override;
  void RmsNormAdd(Rows x, const VectorWeight& weight, float eps, Rows residual) override;
  void Add(Rows x, Rows residual) override;
  void SwiGlu(Rows gate_up, Rows out) override;
  void LinearSwiGlu(Rows x, const LinearWeight& gate_up, Rows room, Rows out) override;
  void Rope(Rows q, Rows k, const VectorWeight& inv_freq, float attention_scaling, int64_t head_dim) override;
  int64_t kv_page_multiple() const override { return 16; }
  int64_t KvPageBytes(const AttentionShape& shape, int64_t page_size) const override;
  void WriteKv(Rows k, Rows v, const AttentionShape& shape, const KvLayer& kv) override;
  void Attention(Rows q, const AttentionShape& shape, const KvLayer& kv, Rows out) override;
  int64_t GdnStateBytes(const GdnShape& shape) const override;
  void GdnResetState(const GdnShape& shape, const GdnLayer& layer, int32_t slot) override;
  void GdnConvAndGates(Rows in, const VectorWeight& weight, const GdnShape& shape, const GdnLayer& layer, Rows out,
                       const GdnGates& gates) override;
  bool normalises_in_conv() const override { return false; }
  void GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out) override;
  void GdnChunkNorm(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows gate,
                    const VectorWeight& norm, float eps, Rows out) override;
  void GatedRmsNorm(Rows x, Rows gate, const VectorWeight& weight, float eps, int64_t head_dim, Rows out) override;

 private:
  // The batch's pieces with their states in `layer`.
  std::span<const Piece> PiecesOf(const GdnLayer& layer);

  const NumericsProfile profile_;
  ThreadScratch scratch_;
  const CpuContext context_;
  StepBatch batch_;
  std::vector<Piece> pieces_;
};

}  // namespace lockstep

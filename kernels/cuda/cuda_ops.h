// CudaOps: the CUDA backend as one object. Every method launches its operation, which lives in a file of its own, on
// one stream; nothing waits but what says so.
//
// A step of decode rows alone is recorded as a CUDA graph, once for each padded size (of few sequences, for each power
// of two of their length), and replayed: its kernels find the batch at fixed addresses. Other steps are launched kernel
// by kernel. Bits are the same either way.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kernels/cuda/batch_image.h"
#include "kernels/cuda/batch_shares.h"
#include "kernels/cuda/gdn_params.h"
#include "kernels/cuda/memory.h"
#include "kernels/ops.h"

namespace lockstep::cuda {

struct CudaOpsOptions {
  int device = 0;
  bool graphs = true;
  bool shared_prefix_attention = true;  // read the keys and values that decode rows have in common once for all
};

class CudaOps final : public Ops {
 public:
  // `threads` converts and copies weights, and must outlive it. INVALID_ARGUMENT for a profile that has no program
  // here; FAILED_PRECONDITION, saying what is there and what is needed, without a GPU this build runs on.
  static absl::StatusOr<std::unique_ptr<CudaOps>> Create(const NumericsProfile& profile, ThreadPool* threads,
                                                         const CudaOpsOptions& options);
  ~CudaOps() override;

  cudaStream_t stream() const { return stream_; }

  const NumericsProfile& profile() const override { return profile_; }
  ThreadPool& threads() override { return threads_; }
  absl::Status UseOnThisThread() override;
  absl::Status status() override;
  void Synchronize() override;
  bool runs_by_itself() const override { return true; }
  int64_t AvailableMemory() const override;
  int64_t reserved_memory() const override;
  absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(int64_t bytes) override;
  void Copy(std::byte* to, const std::byte* from, int64_t bytes) override;
  void CopyToHost(std::byte* to, const std::byte* from, int64_t bytes) override;
  void CopyFromHost(std::byte* to, const std::byte* from, int64_t bytes) override;
  std::vector<float> Download(Rows rows) override;
  DType activation_dtype() const override { return DType::kBF16; }
  DType residual_dtype() const override { return profile_.residual; }
  DType logit_dtype() const override { return profile_.logits; }
  int64_t max_logit_rows() const override { return kMaxRecordedRows; }

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
  void RunStep(const void* owner, absl::FunctionRef<void()> step) override;
  void ForgetSteps(const void* owner) override;
  SharedAttention shared_attention() const override;

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
  int64_t kv_page_multiple() const override { return 64; }
  int64_t KvPageBytes(const AttentionShape& shape, int64_t page_size) const override;
  void WriteKv(Rows k, Rows v, const AttentionShape& shape, const KvLayer& kv) override;
  void Attention(Rows q, const AttentionShape& shape, const KvLayer& kv, Rows out) override;
  int64_t GdnStateBytes(const GdnShape& shape) const override;
  void GdnResetState(const GdnShape& shape, const GdnLayer& layer, int32_t slot) override;
  void GdnConvAndGates(Rows in, const VectorWeight& weight, const GdnShape& shape, const GdnLayer& layer, Rows out,
                       const GdnGates& gates) override;
  bool normalises_in_conv() const override { return true; }
  void GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out) override;
  void GdnChunkNorm(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows gate,
                    const VectorWeight& norm, float eps, Rows out) override;
  void GatedRmsNorm(Rows x, Rows gate, const VectorWeight& weight, float eps, int64_t head_dim, Rows out) override;

 private:
  // One of the two host images that steps take in turn: the device may still read the other.
  struct Image {
    PinnedMemory host;
    cudaEvent_t copied = nullptr;
  };

  CudaOps(const NumericsProfile& profile, ThreadPool* threads, const CudaOpsOptions& options)
      : profile_(profile), threads_(*threads), options_(options) {}
  absl::Status Init();
  // Keeps the first error.
  void Keep(const absl::Status& status);
  // Uploads [rows, cols] of the parts as `dtype`, bf16 or fp32, to `to`.
  absl::Status Upload(std::span<const HostMatrix> parts, DType dtype, std::byte* to);
  // Room for an image of `bytes` on both sides. Recorded steps are forgotten if it moves.
  absl::Status ReserveImage(int64_t bytes);
  // Memory for one operation's intermediate results; the stream orders its users. Also while a step is recorded.
  std::byte* Workspace(int64_t bytes);
  // The prefill rows of a Gated DeltaNet layer, if there are any.
  void GdnPrefill(const GdnParams& gdn);
  void Record(absl::FunctionRef<void()> step, cudaGraphExec_t* graph);
  void ForgetAllSteps();

  const NumericsProfile profile_;
  ThreadPool& threads_;
  const CudaOpsOptions options_;
  cudaStream_t stream_ = nullptr;
  absl::Status status_;

  Image images_[2];
  int next_image_ = 0;
  const std::byte* step_image_ = nullptr;  // the current step's, on the host; null: it has none
  std::unique_ptr<CudaMemory> device_image_;
  PinnedMemory upload_[2];  // what weights go through, in turn; locking pages anew for each matrix would take seconds
  // The last one is in use; kernels in flight and recorded steps may still use outgrown ones.
  std::vector<std::unique_ptr<CudaMemory>> workspaces_;
  ShareFinder share_finder_;
  BatchSizes sizes_;              // of the current step
  DeviceBatch batch_;             // the current step's
  int64_t record_ = 0;            // rows of the current step if it is to be replayed; else 0
  int64_t max_positions_ = 0;     // at least every piece's last position + 1: a power of two
  bool asked_positions_ = false;  // whether the operations since it was cleared depend on max_positions_
  struct RecordKey {
    const void* owner;
    int64_t rows;           // padded
    bool shares;            // whether rows have keys and values in common: a kernel more in each layer
    int64_t max_positions;  // 0: the step is the same for any
    auto operator<=>(const RecordKey&) const = default;
  };
  std::map<RecordKey, cudaGraphExec_t> recorded_;
};

}  // namespace lockstep::cuda

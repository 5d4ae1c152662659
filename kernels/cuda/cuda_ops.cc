#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/add.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/batch_shares.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/gdn_conv.h"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_gates.h"
#include "kernels/cuda/gdn_prefill.h"
#include "kernels/cuda/gdn_state.h"
#include "kernels/cuda/kv_cache.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/round_rows.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/cuda/weight_inbox.h"
#include "kernels/cuda/weight_stage.h"
#include "kernels/float_bits.h"
#include "kernels/host_values.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kFeatureMultiple = 8;              // output features are padded to whole 16-byte groups
constexpr int64_t kUploadBytes = int64_t{64} << 20;  // of one of the two pinned buffers that weights go through
// Left to the runtime, to graphs and to workspaces when memory is planned.
constexpr int64_t kReserveBytes = int64_t{1} << 30;
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
// At most, for a step's prompts in a Gated DeltaNet layer: 8,448 rows of a 7B at a time.
constexpr int64_t kGdnPrefillBytes = int64_t{256} << 20;
// Attention over few sequences is cut up by the longest one's length, so a recorded step is one for lengths up to a
// power of two, this at least.
constexpr int64_t kMinPositions = 2048;

class CudaLinearWeight final : public LinearWeight {
 public:
  CudaLinearWeight(int64_t out, int64_t in, std::unique_ptr<CudaMemory> memory)
      : out_(out), in_(in), memory_(std::move(memory)) {}
  int64_t out_features() const override { return out_; }
  int64_t in_features() const override { return in_; }
  int64_t bytes() const override { return memory_->bytes(); }
  // [padded_out, in], the padding zero.
  const __nv_bfloat16* data() const { return reinterpret_cast<const __nv_bfloat16*>(memory_->data()); }
  std::byte* memory() { return memory_->data(); }
  int64_t padded_out() const { return memory_->bytes() / (in_ * DTypeBytes(DType::kBF16)); }

 private:
  const int64_t out_, in_;
  const std::unique_ptr<CudaMemory> memory_;
};

class CudaEmbeddingTable final : public EmbeddingTable {
 public:
  // `memory`: null where `data` is another's.
  CudaEmbeddingTable(int64_t vocab, int64_t hidden, DType dtype, const void* data, std::unique_ptr<CudaMemory> memory)
      : vocab_(vocab), hidden_(hidden), dtype_(dtype), data_(data), memory_(std::move(memory)) {}
  int64_t vocab() const override { return vocab_; }
  int64_t hidden() const override { return hidden_; }
  int64_t bytes() const override { return memory_ == nullptr ? 0 : memory_->bytes(); }
  DType dtype() const { return dtype_; }
  const void* data() const { return data_; }       // [vocab, hidden] of dtype()
  std::byte* memory() { return memory_->data(); }  // its own; not of a tied one

 private:
  const int64_t vocab_, hidden_;
  const DType dtype_;
  const void* const data_;
  const std::unique_ptr<CudaMemory> memory_;
};

class CudaVector final : public VectorWeight {
 public:
  CudaVector(int64_t size, DType dtype, std::unique_ptr<CudaMemory> memory)
      : size_(size), dtype_(dtype), memory_(std::move(memory)) {}
  const void* data() const override { return memory_->data(); }
  std::byte* memory() { return memory_->data(); }
  int64_t size() const override { return size_; }
  DType dtype() const override { return dtype_; }

 private:
  const int64_t size_;
  const DType dtype_;
  const std::unique_ptr<CudaMemory> memory_;
};

__nv_bfloat16* Bf16(const Rows& rows) {
  LOCKSTEP_CHECK(rows.dtype == DType::kBF16, "rows of {}, want bfloat16", DTypeName(rows.dtype));
  return static_cast<__nv_bfloat16*>(rows.data);
}
float* F32(const Rows& rows) {
  LOCKSTEP_CHECK(rows.dtype == DType::kF32, "rows of {}, want float32", DTypeName(rows.dtype));
  return static_cast<float*>(rows.data);
}
const __nv_bfloat16* Bf16(const VectorWeight& weight) {
  LOCKSTEP_CHECK(weight.dtype() == DType::kBF16, "a vector of {}, want bfloat16", DTypeName(weight.dtype()));
  return static_cast<const __nv_bfloat16*>(weight.data());
}
const float* F32(const VectorWeight& weight) {
  LOCKSTEP_CHECK(weight.dtype() == DType::kF32, "a vector of {}, want float32", DTypeName(weight.dtype()));
  return weight.floats();
}

GdnStateLayout LayoutOf(const GdnShape& shape) {
  return MakeGdnStateLayout(shape.key_heads, shape.value_heads, shape.conv_width);
}

std::optional<AttentionProgram> ProgramOf(lockstep::AttentionProgram program) {
  switch (program) {
    case lockstep::AttentionProgram::kTiles128Forward:
      return AttentionProgram::kCudnn;
    case lockstep::AttentionProgram::kTiles128ForwardMask:
      return AttentionProgram::kCudnnMask;
    case lockstep::AttentionProgram::kTiles64Backward:
      return AttentionProgram::kFa2;
    case lockstep::AttentionProgram::kTiles512Forward:
      break;
  }
  return std::nullopt;
}

// What the kernels of this folder compute. Names the first field that they do not.
absl::Status CheckProfile(const NumericsProfile& p) {
  const DType stream = p.residual;
  const bool fp32 = stream == DType::kF32;
  const std::tuple<const char*, bool, const char*> fields[] = {
      {"weights", p.weights == DType::kBF16, "bfloat16"},
      {"activations", p.activations == DType::kBF16, "bfloat16"},
      {"residual", fp32 || stream == DType::kBF16, "bfloat16 or float32"},
      {"embedding", p.embedding == stream, "the residual stream's dtype"},
      {"norm_weights", p.norm_weights == stream, "the residual stream's dtype"},
      {"gated_norm", (p.gated_norm == GatedNormCasts::kTwo) == fp32, "kTwo with fp32 norm weights and only then"},
      {"kv", p.kv == DType::kBF16, "bfloat16"},
      {"gdn", p.gdn == GdnProgram::kChunkBf16, "kChunkBf16"},
      {"attention", ProgramOf(p.attention).has_value(), "an order of a GPU's"},
      {"sliding_attention", ProgramOf(p.sliding_attention).has_value(), "an order of a GPU's"},
      {"attention_exp", p.attention_exp == AttentionExp::kExact, "kExact"},
      {"attention_p", p.attention_p == DType::kBF16, "bfloat16"},
      {"logits", p.logits != DType::kF16, "bfloat16 or float32"}};
  for (const auto& [field, known, want] : fields) {
    if (known) continue;
    return absl::InvalidArgumentError(absl::StrCat("--numerics: profile \"", std::string(p.name), "\", field ", field,
                                                   ": --backend cuda has no program for it, want ", want,
                                                   "; \"hf\" is one that has all"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaOps>> CudaOps::Create(const NumericsProfile& profile, ThreadPool* threads,
                                                         const CudaOpsOptions& options) {
  LOCKSTEP_RETURN_IF_ERROR(CheckProfile(profile));
  std::unique_ptr<CudaOps> ops(new CudaOps(profile, threads, options));
  LOCKSTEP_RETURN_IF_ERROR(ops->Init());
  return ops;
}

absl::Status CudaOps::UseOnThisThread() {
  return CudaStatus(cudaSetDevice(options_.device), "cudaSetDevice");
}

absl::Status CudaOps::Init() {
  LOCKSTEP_RETURN_IF_ERROR(UseOnThisThread());
  // Steps go before what weights arriving for an update run.
  int lowest = 0, highest = 0;
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange"));
  LOCKSTEP_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest), "cudaStreamCreate"));
  for (Image& image : images_) {
    LOCKSTEP_RETURN_IF_ERROR(
        CudaStatus(cudaEventCreateWithFlags(&image.copied, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
  }
  return ReserveImage(int64_t{1} << 20);
}

CudaOps::~CudaOps() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  ForgetAllSteps();
  for (Image& image : images_) {
    if (image.copied != nullptr) cudaEventDestroy(image.copied);
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void CudaOps::ForgetAllSteps() {
  for (const auto& [key, graph] : recorded_) cudaGraphExecDestroy(graph);
  recorded_.clear();
}

void CudaOps::ForgetSteps(const void* owner) {
  cudaStreamSynchronize(stream_);
  std::erase_if(recorded_, [owner](const auto& entry) {
    if (entry.first.owner != owner) return false;
    cudaGraphExecDestroy(entry.second);
    return true;
  });
}

void CudaOps::Keep(const absl::Status& status) {
  if (status_.ok()) status_ = status;
}

absl::Status CudaOps::status() {
  return std::exchange(status_, absl::OkStatus());
}

void CudaOps::Synchronize() {
  Keep(CudaStatus(cudaStreamSynchronize(stream_), "a step on the device"));
}

int64_t CudaOps::AvailableMemory() const {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return 0;
  return std::max<int64_t>(static_cast<int64_t>(free) - kReserveBytes, 0);
}

int64_t CudaOps::reserved_memory() const {
  return kReserveBytes;
}

absl::StatusOr<std::unique_ptr<DeviceMemory>> CudaOps::Allocate(int64_t bytes) {
  return CudaMemory::AllocateZeroed(bytes);
}

void CudaOps::CopyToHost(std::byte* to, const std::byte* from, int64_t bytes) {
  Keep(CudaStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "CopyToHost"));
  Synchronize();
}

void CudaOps::CopyFromHost(std::byte* to, const std::byte* from, int64_t bytes) {
  Keep(CudaStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "CopyFromHost"));
  Synchronize();
}

void CudaOps::Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  Keep(CudaStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "Copy"));
}

std::vector<float> CudaOps::Download(Rows rows) {
  std::vector<float> values(rows.rows * rows.width);
  const int64_t element = DTypeBytes(rows.dtype);
  std::vector<std::byte> raw(rows.rows * rows.width * element);
  Keep(CudaStatus(cudaMemcpy2DAsync(raw.data(), rows.width * element, rows.data, rows.stride * element,
                                    rows.width * element, rows.rows, cudaMemcpyDeviceToHost, stream_),
                  "Download"));
  Synchronize();
  for (size_t i = 0; i < values.size(); ++i) {
    if (rows.dtype == DType::kF32) {
      std::memcpy(&values[i], raw.data() + i * element, sizeof(float));
    } else {
      uint16_t bits;
      std::memcpy(&bits, raw.data() + i * element, sizeof(bits));
      values[i] = Bf16ToF32(bits);
    }
  }
  return values;
}

absl::Status CudaOps::Upload(std::span<const HostMatrix> parts, DType dtype, std::byte* to) {
  for (PinnedMemory& buffer : upload_) {
    if (buffer.bytes() > 0) continue;
    LOCKSTEP_ASSIGN_OR_RETURN(buffer, PinnedMemory::Allocate(kUploadBytes));
  }
  int turn = 0;
  for (const HostMatrix& part : parts) {
    const int64_t row_bytes = part.cols * DTypeBytes(dtype);
    const int64_t block = std::max<int64_t>(kUploadBytes / row_bytes, 1);
    LOCKSTEP_CHECK(row_bytes <= kUploadBytes, "a row of {} columns", part.cols);
    for (int64_t begin = 0; begin < part.rows; begin += block, turn ^= 1) {
      const int64_t rows = std::min(block, part.rows - begin);
      // The copy before last used this buffer.
      LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventSynchronize(images_[turn].copied), "Upload"));
      std::byte* staged = upload_[turn].data();
      threads_.ParallelFor(rows, 64, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; ++r) {
          const std::byte* from =
              static_cast<const std::byte*>(part.data) + (begin + r) * part.cols * DTypeBytes(part.dtype);
          ConvertValues(from, part.dtype, part.cols, dtype, staged + r * row_bytes);
        }
      });
      LOCKSTEP_RETURN_IF_ERROR(
          CudaStatus(cudaMemcpyAsync(to, staged, rows * row_bytes, cudaMemcpyHostToDevice, stream_), "Upload"));
      LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaEventRecord(images_[turn].copied, stream_), "Upload"));
      to += rows * row_bytes;
    }
  }
  return CudaStatus(cudaStreamSynchronize(stream_), "Upload");
}

absl::StatusOr<std::unique_ptr<LinearWeight>> CudaOps::PackLinear(std::span<const HostMatrix> parts) {
  int64_t out = 0;
  for (const HostMatrix& part : parts) {
    LOCKSTEP_CHECK(part.data != nullptr && part.rows > 0 && part.cols == parts[0].cols, "PackLinear: a part [{}, {}]",
                   part.rows, part.cols);
    out += part.rows;
  }
  const int64_t padded = (out + kFeatureMultiple - 1) / kFeatureMultiple * kFeatureMultiple;
  LOCKSTEP_ASSIGN_OR_RETURN(auto memory, CudaMemory::AllocateZeroed(padded * parts[0].cols * DTypeBytes(DType::kBF16)));
  LOCKSTEP_RETURN_IF_ERROR(Upload(parts, DType::kBF16, memory->data()));
  return std::make_unique<CudaLinearWeight>(out, parts[0].cols, std::move(memory));
}

absl::StatusOr<std::unique_ptr<EmbeddingTable>> CudaOps::PackEmbedding(const HostMatrix& table) {
  LOCKSTEP_CHECK(table.data != nullptr && table.rows > 0 && table.cols > 0, "PackEmbedding: empty table [{}, {}]",
                 table.rows, table.cols);
  // Whatever the checkpoint's: a learner may send finer values later.
  const DType dtype = profile_.embedding;
  LOCKSTEP_ASSIGN_OR_RETURN(auto memory, CudaMemory::Allocate(table.rows * table.cols * DTypeBytes(dtype)));
  LOCKSTEP_RETURN_IF_ERROR(Upload({&table, 1}, dtype, memory->data()));
  const void* data = memory->data();
  return std::make_unique<CudaEmbeddingTable>(table.rows, table.cols, dtype, data, std::move(memory));
}

std::unique_ptr<EmbeddingTable> CudaOps::TieEmbedding(const LinearWeight& head) {
  const auto& packed = static_cast<const CudaLinearWeight&>(head);
  return std::make_unique<CudaEmbeddingTable>(packed.out_features(), packed.in_features(), DType::kBF16, packed.data(),
                                              nullptr);
}

absl::StatusOr<std::unique_ptr<VectorWeight>> CudaOps::PackVector(std::span<const float> values, bool exact) {
  const DType dtype = exact ? DType::kF32 : DType::kBF16;
  std::vector<uint16_t> rounded;
  const void* from = values.data();
  if (!exact) {
    for (const float value : values) rounded.push_back(F32ToBf16(value));
    from = rounded.data();
  }
  const int64_t size = static_cast<int64_t>(values.size());
  LOCKSTEP_ASSIGN_OR_RETURN(auto memory, CudaMemory::Allocate(size * DTypeBytes(dtype)));
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(memory->data(), from, memory->bytes(), cudaMemcpyHostToDevice, stream_), "PackVector"));
  // `rounded` is about to go.
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "PackVector"));
  return std::make_unique<CudaVector>(size, dtype, std::move(memory));
}

absl::StatusOr<std::unique_ptr<WeightStage>> CudaOps::MakeWeightStage(int64_t bytes) {
  return CudaWeightStage::Create(bytes);
}
absl::StatusOr<std::unique_ptr<LiveWeights>> CudaOps::MakeLiveWeights(std::span<const WeightPlace> places) {
  std::vector<StageRegion> regions;
  for (const WeightPlace& place : places) {
    StageRegion& region = regions.emplace_back(StageRegion{.offset = place.offset, .bytes = place.bytes()});
    DType dtype = DType::kBF16;
    if (place.linear != nullptr) {
      auto& weight = static_cast<CudaLinearWeight&>(*place.linear);
      LOCKSTEP_CHECK(place.cols == weight.in_features() && place.first_row + place.rows <= weight.out_features(),
                     "[{}, {}] at row {} of [{}, {}]", place.rows, place.cols, place.first_row, weight.out_features(),
                     weight.in_features());
      region.data = weight.memory() + place.first_row * place.cols * DTypeBytes(dtype);
    } else if (place.embedding != nullptr) {
      auto& table = static_cast<CudaEmbeddingTable&>(*place.embedding);
      LOCKSTEP_CHECK(place.bytes() == table.bytes(), "{} bytes of an embedding of {}", place.bytes(), table.bytes());
      dtype = table.dtype();
      region.data = table.memory();
    } else {
      auto& vector = static_cast<CudaVector&>(*place.vector);
      LOCKSTEP_CHECK(place.bytes() == vector.bytes(), "{} bytes of a vector of {}", place.bytes(), vector.bytes());
      dtype = vector.dtype();
      region.data = vector.memory();
    }
    LOCKSTEP_CHECK(place.dtype == dtype, "values of {} for a weight of {}", DTypeName(place.dtype), DTypeName(dtype));
  }
  return CudaWeightStage::CreateLive(std::move(regions));
}
absl::StatusOr<std::unique_ptr<WeightInbox>> CudaOps::MakeWeightInbox(int64_t buffer_bytes, int64_t tallies) {
  return CudaWeightInbox::Create(buffer_bytes, tallies);
}

void CudaOps::StoreLinear(const HostMatrix& from, int64_t first_row, LinearWeight& to) {
  auto& weight = static_cast<CudaLinearWeight&>(to);
  LOCKSTEP_CHECK(from.cols == weight.in_features() && first_row >= 0 &&
                     first_row + from.rows <= weight.out_features() && from.dtype == DType::kBF16,
                 "StoreLinear: [{}, {}] of {} at row {} of [{}, {}]", from.rows, from.cols, DTypeName(from.dtype),
                 first_row, weight.out_features(), weight.in_features());
  const int64_t row_bytes = from.cols * DTypeBytes(DType::kBF16);
  Copy(weight.memory() + first_row * row_bytes, static_cast<const std::byte*>(from.data), from.rows * row_bytes);
}

void CudaOps::StoreEmbedding(const HostMatrix& from, EmbeddingTable& to) {
  auto& table = static_cast<CudaEmbeddingTable&>(to);
  LOCKSTEP_CHECK(
      from.rows == table.vocab() && from.cols == table.hidden() && from.dtype == table.dtype() && table.bytes() > 0,
      "StoreEmbedding: [{}, {}] of {} into [{}, {}] of {}", from.rows, from.cols, DTypeName(from.dtype), table.vocab(),
      table.hidden(), DTypeName(table.dtype()));
  Copy(table.memory(), static_cast<const std::byte*>(from.data), table.bytes());
}

void CudaOps::StoreVector(const std::byte* from, VectorWeight& to) {
  auto& vector = static_cast<CudaVector&>(to);
  Copy(vector.memory(), from, vector.bytes());
}

absl::Status CudaOps::ReserveImage(int64_t bytes) {
  if (device_image_ != nullptr && device_image_->bytes() >= bytes) return absl::OkStatus();
  LOCKSTEP_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(stream_), "a step on the device"));
  ForgetAllSteps();
  LOCKSTEP_ASSIGN_OR_RETURN(device_image_, CudaMemory::Allocate(2 * bytes));
  for (Image& image : images_) {
    LOCKSTEP_ASSIGN_OR_RETURN(image.host, PinnedMemory::Allocate(2 * bytes));
  }
  return absl::OkStatus();
}

std::byte* CudaOps::Workspace(int64_t bytes) {
  if (workspaces_.empty() || workspaces_.back()->bytes() < bytes) {
    // Twice the last: what is kept of outgrown ones stays below the newest one's size.
    const int64_t grown = workspaces_.empty() ? kWorkspaceBytes : 2 * workspaces_.back()->bytes();
    auto memory = CudaMemory::Allocate(std::max(bytes, grown));
    if (!memory.ok()) {
      Keep(memory.status());
      return nullptr;
    }
    workspaces_.push_back(*std::move(memory));
  }
  return workspaces_.back()->data();
}

StepRows CudaOps::BeginStep(const StepBatch& batch) {
  sizes_ = SizesOf(batch, batch.page_size);
  record_ = options_.graphs && IsDecodeStep(batch) ? RecordedRows(sizes_.rows) : 0;
  if (record_ > 0) sizes_ = RecordedSizes(record_, sizes_.pages);
  if (options_.shared_prefix_attention) sizes_.shares = MaxShares(sizes_.decode_pieces);
  max_positions_ = kMinPositions;
  for (const Piece& piece : batch.pieces) {
    while (max_positions_ < piece.position + piece.row_count) max_positions_ *= 2;
  }
  step_image_ = nullptr;
  if (const absl::Status status = ReserveImage(sizes_.bytes()); !status.ok()) {
    Keep(status);
    return {sizes_.rows, std::min(sizes_.logit_rows, max_logit_rows())};
  }
  Image& image = images_[next_image_];
  next_image_ ^= 1;
  Keep(CudaStatus(cudaEventSynchronize(image.copied), "a step on the device"));
  const int64_t shares = WriteBatchImage(batch, sizes_, batch.page_size, share_finder_, image.host.data());
  step_image_ = image.host.data();
  Keep(CudaStatus(
      cudaMemcpyAsync(device_image_->data(), image.host.data(), sizes_.bytes(), cudaMemcpyHostToDevice, stream_),
      "BeginStep"));
  Keep(CudaStatus(cudaEventRecord(image.copied, stream_), "BeginStep"));
  batch_ = BatchAt(device_image_->data(), sizes_);
  // A recorded step is good for any number of shares, or for none.
  if (record_ == 0 || shares == 0) batch_.share_count = static_cast<int32_t>(shares);
  return {sizes_.rows, std::min(sizes_.logit_rows, max_logit_rows())};
}

void CudaOps::RunStep(const void* owner, absl::FunctionRef<void()> step) {
  if (!status_.ok()) return;
  if (record_ == 0) {
    step();
    return;
  }
  RecordKey key{owner, record_, batch_.share_count > 0, 0};
  auto found = recorded_.find(key);
  if (found == recorded_.end()) {
    key.max_positions = max_positions_;
    found = recorded_.find(key);
  }
  if (found == recorded_.end()) {
    cudaGraphExec_t graph = nullptr;
    asked_positions_ = false;
    Record(step, &graph);
    if (!status_.ok()) return;
    if (!asked_positions_) key.max_positions = 0;
    found = recorded_.emplace(key, graph).first;
  }
  Keep(CudaStatus(cudaGraphLaunch(found->second, stream_), "a recorded step"));
}

void CudaOps::Record(absl::FunctionRef<void()> step, cudaGraphExec_t* graph) {
  Keep(CudaStatus(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture"));
  if (!status_.ok()) return;
  step();
  cudaGraph_t captured = nullptr;
  Keep(CudaStatus(cudaStreamEndCapture(stream_, &captured), "cudaStreamEndCapture"));
  if (captured == nullptr) return;
  if (status_.ok()) Keep(CudaStatus(cudaGraphInstantiate(graph, captured, 0), "cudaGraphInstantiate"));
  cudaGraphDestroy(captured);
}

SharedAttention CudaOps::shared_attention() const {
  if (step_image_ == nullptr) return {};
  return {.shares = SharesOf(step_image_, sizes_), .state_bytes = sizeof(RowState)};
}

void CudaOps::Embed(const EmbeddingTable& table, Rows out) {
  const auto& packed = static_cast<const CudaEmbeddingTable&>(table);
  Keep(LaunchEmbedding({.tokens = batch_.tokens,
                        .table = packed.data(),
                        .out = out.data,
                        .rows = out.rows,
                        .vocab = packed.vocab(),
                        .hidden = packed.hidden(),
                        .out_stride = out.stride,
                        .table_dtype = packed.dtype(),
                        .out_dtype = out.dtype},
                       stream_));
}

void CudaOps::GatherLogitRows(Rows x, int64_t begin, Rows out) {
  Keep(LaunchGatherRows({.indices = LogitRowsAt(device_image_->data(), sizes_) + begin,
                         .in = x.data,
                         .out = out.data,
                         .rows = out.rows,
                         .in_rows = x.rows,
                         .width = out.width,
                         .in_stride = x.stride,
                         .out_stride = out.stride,
                         .dtype = x.dtype},
                        stream_));
}

void CudaOps::RoundResidual(Rows x, Rows out) {
  Keep(LaunchRoundRows(
      {.x = F32(x), .out = Bf16(out), .rows = x.rows, .width = x.width, .x_stride = x.stride, .out_stride = out.stride},
      stream_));
}

namespace {

// Weights are written by copies of the operations' stream, or of others while no step runs; slots by copies, and by
// one kernel a layer in a step; and each step begins with a copy.
constexpr bool kEarlyStart = true;

}  // namespace

void CudaOps::Linear(Rows x, const LinearWeight& weight, Rows out) {
  const auto& packed = static_cast<const CudaLinearWeight&>(weight);
  LOCKSTEP_CHECK(x.width == packed.in_features() && out.width == packed.out_features() && x.rows == out.rows,
                 "Linear: [{}, {}] by [{}, {}] into [{}, {}]", x.rows, x.width, packed.out_features(),
                 packed.in_features(), out.rows, out.width);
  Keep(LaunchLinear({.x = Bf16(x),
                     .weight = packed.data(),
                     .out = out.data,
                     .out_dtype = out.dtype == DType::kF32 ? LinearOutput::kFp32 : LinearOutput::kBf16,
                     .m = x.rows,
                     .n = packed.padded_out(),
                     .k = x.width,
                     .x_stride = x.stride,
                     .out_stride = out.stride,
                     .early_start = kEarlyStart},
                    stream_));
}

void CudaOps::Logits(Rows x, const LinearWeight& weight, Rows out) {
  Linear(x, weight, out);
}

void CudaOps::RmsNorm(Rows x, const VectorWeight& weight, float eps, Rows out) {
  Keep(LaunchRmsNorm({.fusion = RmsNormFusion::kNone,
                      .x = x.data,
                      .weight = weight.data(),
                      .out = Bf16(out),
                      .rows = x.rows,
                      .width = x.width,
                      .x_stride = x.stride,
                      .out_stride = out.stride,
                      .eps = eps,
                      .x_dtype = x.dtype,
                      .weight_dtype = weight.dtype()},
                     stream_));
}

void CudaOps::AddRmsNorm(Rows x, Rows residual, const VectorWeight& weight, float eps, Rows out) {
  Keep(LaunchRmsNorm({.fusion = RmsNormFusion::kAddBefore,
                      .x = Bf16(x),
                      .weight = weight.data(),
                      .residual = residual.data,
                      .out = Bf16(out),
                      .rows = x.rows,
                      .width = x.width,
                      .x_stride = x.stride,
                      .residual_stride = residual.stride,
                      .out_stride = out.stride,
                      .eps = eps,
                      .weight_dtype = weight.dtype(),
                      .residual_dtype = residual.dtype},
                     stream_));
}

void CudaOps::RmsNormAdd(Rows x, const VectorWeight& weight, float eps, Rows residual) {
  Keep(LaunchRmsNorm({.fusion = RmsNormFusion::kAddAfter,
                      .x = Bf16(x),
                      .weight = weight.data(),
                      .residual = residual.data,
                      .rows = x.rows,
                      .width = x.width,
                      .x_stride = x.stride,
                      .residual_stride = residual.stride,
                      .eps = eps,
                      .weight_dtype = weight.dtype(),
                      .residual_dtype = residual.dtype},
                     stream_));
}

void CudaOps::Add(Rows x, Rows residual) {
  Keep(LaunchAdd({.x = Bf16(x),
                  .residual = residual.data,
                  .rows = x.rows,
                  .width = x.width,
                  .x_stride = x.stride,
                  .residual_stride = residual.stride,
                  .residual_dtype = residual.dtype},
                 stream_));
}

void CudaOps::SwiGlu(Rows gate_up, Rows out) {
  Keep(LaunchSwiGlu({.gate_up = Bf16(gate_up),
                     .out = Bf16(out),
                     .rows = out.rows,
                     .width = out.width,
                     .gate_up_stride = gate_up.stride,
                     .out_stride = out.stride},
                    stream_));
}

void CudaOps::LinearSwiGlu(Rows x, const LinearWeight& gate_up, Rows, Rows out) {
  const auto& packed = static_cast<const CudaLinearWeight&>(gate_up);
  LOCKSTEP_CHECK(x.width == packed.in_features() && 2 * out.width == packed.out_features() && x.rows == out.rows,
                 "LinearSwiGlu: [{}, {}] by [{}, {}] into [{}, {}]", x.rows, x.width, packed.out_features(),
                 packed.in_features(), out.rows, out.width);
  Keep(LaunchLinear({.x = Bf16(x),
                     .weight = packed.data(),
                     .out = Bf16(out),
                     .fusion = LinearFusion::kSwiGlu,
                     .m = x.rows,
                     .n = out.width,
                     .k = x.width,
                     .x_stride = x.stride,
                     .out_stride = out.stride,
                     .early_start = kEarlyStart},
                    stream_));
}

void CudaOps::Rope(Rows q, Rows k, const VectorWeight& inv_freq, float attention_scaling, int64_t head_dim) {
  LOCKSTEP_CHECK(head_dim == kKvHeadDim, "Rope: heads of {}", head_dim);
  Keep(LaunchRope({.batch = batch_,
                   .q = Bf16(q),
                   .k = Bf16(k),
                   .inv_freq = F32(inv_freq),
                   .heads = q.width / head_dim,
                   .kv_heads = k.width / head_dim,
                   .q_stride = q.stride,
                   .k_stride = k.stride,
                   .attention_scaling = attention_scaling},
                  stream_));
}

int64_t CudaOps::KvPageBytes(const AttentionShape& shape, int64_t page_size) const {
  return cuda::KvPageBytes(shape.kv_heads, page_size);
}

namespace {

KvPages PagesOf(const AttentionShape& shape, const KvLayer& kv) {
  return {.base = kv.base,
          .page_count = kv.page_count,
          .page_bytes = KvPageBytes(shape.kv_heads, kv.page_size),
          .page_size = kv.page_size,
          .kv_heads = shape.kv_heads};
}

}  // namespace

void CudaOps::WriteKv(Rows k, Rows v, const AttentionShape& shape, const KvLayer& kv) {
  Keep(LaunchWriteKv({.batch = batch_,
                      .k = Bf16(k),
                      .v = Bf16(v),
                      .k_stride = k.stride,
                      .v_stride = v.stride,
                      .kv = PagesOf(shape, kv)},
                     stream_));
}

void CudaOps::Attention(Rows q, const AttentionShape& shape, const KvLayer& kv, Rows out) {
  asked_positions_ |= DecodeIsSpread(batch_.decode_pieces, shape.heads, shape.kv_heads);
  const int64_t workspace = AttentionWorkspaceBytes(batch_, shape.heads, shape.kv_heads, max_positions_);
  Keep(LaunchAttention({.program = *ProgramOf(shape.window > 0 ? profile_.sliding_attention : profile_.attention),
                        .batch = batch_,
                        .q = Bf16(q),
                        .out = Bf16(out),
                        .q_stride = q.stride,
                        .out_stride = out.stride,
                        .kv = PagesOf(shape, kv),
                        .heads = shape.heads,
                        .window = shape.window,
                        .scale = shape.scale,
                        .workspace = workspace > 0 ? Workspace(workspace) : nullptr,
                        .workspace_bytes = workspace,
                        .max_positions = max_positions_},
                       stream_));
}

int64_t CudaOps::GdnStateBytes(const GdnShape& shape) const {
  return LayoutOf(shape).bytes;
}

// Nothing of a slot is read before its sequence has written it.
void CudaOps::GdnResetState(const GdnShape&, const GdnLayer&, int32_t) {}

void CudaOps::GdnConvAndGates(Rows in, const VectorWeight& weight, const GdnShape& shape, const GdnLayer& layer,
                              Rows out, const GdnGates& gates) {
  LOCKSTEP_CHECK(shape.conv_width == kGdnConvWidth, "GdnConvAndGates: width {}", shape.conv_width);
  Keep(LaunchGdnConvAndGates({.in = Bf16(in),
                              .weight = Bf16(weight),
                              .out = Bf16(out),
                              .tail = layer.base + LayoutOf(shape).conv_tail,
                              .slot_stride = layer.slot_stride,
                              .in_stride = in.stride,
                              .out_stride = out.stride,
                              .key_heads = shape.key_heads,
                              .key_dim = shape.key_dim,
                              .value_width = shape.value_width(),
                              .casts = profile_.conv,
                              .batch = batch_},
                             {.a = Bf16(gates.a),
                              .b = Bf16(gates.b),
                              .a_log = F32(gates.a_log),
                              .dt_bias = F32(gates.dt_bias),
                              .beta = Bf16(gates.beta),
                              .g = F32(gates.g),
                              .rows = gates.a.rows,
                              .heads = gates.a.width,
                              .a_stride = gates.a.stride,
                              .b_stride = gates.b.stride,
                              .beta_stride = gates.beta.stride,
                              .g_stride = gates.g.stride,
                              .neg_eigval = gates.neg_eigval},
                             stream_));
}

namespace {

GdnParams GdnParamsOf(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out,
                      const DeviceBatch& batch) {
  return {.q = Bf16(qkv),
          .k = Bf16(qkv) + shape.key_width(),
          .v = Bf16(qkv) + 2 * shape.key_width(),
          .beta = Bf16(beta),
          .g = F32(g),
          .out = Bf16(out),
          .q_stride = qkv.stride,
          .k_stride = qkv.stride,
          .v_stride = qkv.stride,
          .beta_stride = beta.stride,
          .g_stride = g.stride,
          .out_stride = out.stride,
          .key_heads = static_cast<int32_t>(shape.key_heads),
          .value_heads = static_cast<int32_t>(shape.value_heads),
          .state = reinterpret_cast<char*>(layer.base),
          .slot_stride = layer.slot_stride,
          .layout = LayoutOf(shape),
          .batch = batch,
          .early_start = kEarlyStart};
}

// The profile's weight of the gated norm.
const void* GatedNormWeight(const VectorWeight& weight, GatedNormCasts casts) {
  return casts == GatedNormCasts::kTwo ? static_cast<const void*>(F32(weight)) : static_cast<const void*>(Bf16(weight));
}

}  // namespace

void CudaOps::GdnPrefill(const GdnParams& gdn) {
  if (gdn.batch.tile_count == 0) return;
  const int64_t workspace = std::clamp(GdnPrefillWorkspaceBytes(gdn.value_heads, gdn.batch.tile_count),
                                       GdnPrefillWorkspaceBytes(gdn.value_heads, 1), kGdnPrefillBytes);
  Keep(LaunchGdnPrefill({.gdn = gdn, .workspace = Workspace(workspace), .workspace_bytes = workspace}, stream_));
}

void CudaOps::GdnChunk(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows out) {
  const GdnParams gdn = GdnParamsOf(qkv, beta, g, shape, layer, out, batch_);
  GdnPrefill(gdn);
  if (batch_.decode_pieces > 0) Keep(LaunchGdnDecode(gdn, stream_));
}

// Decode rows come first in a batch and leave their kernel normalised; prefill rows follow them.
void CudaOps::GdnChunkNorm(Rows qkv, Rows beta, Rows g, const GdnShape& shape, const GdnLayer& layer, Rows gate,
                           const VectorWeight& norm, float eps, Rows out) {
  LOCKSTEP_CHECK(shape.value_dim == kGdnValueDim, "GdnChunkNorm: heads of {}", shape.value_dim);
  const GdnParams gdn = GdnParamsOf(qkv, beta, g, shape, layer, out, batch_);
  const int64_t decoded = batch_.decode_pieces;
  GdnPrefill(gdn);
  if (decoded > 0) {
    Keep(LaunchGdnDecodeNorm(gdn,
                             {.gate = Bf16(gate),
                              .weight = GatedNormWeight(norm, profile_.gated_norm),
                              .gate_stride = gate.stride,
                              .eps = eps,
                              .casts = profile_.gated_norm},
                             stream_));
  }
  if (out.rows == decoded) return;
  const Rows prefilled = out.slice(decoded, out.rows - decoded);
  GatedRmsNorm(prefilled, gate.slice(decoded, prefilled.rows), norm, eps, shape.value_dim, prefilled);
}

void CudaOps::GatedRmsNorm(Rows x, Rows gate, const VectorWeight& weight, float eps, int64_t head_dim, Rows out) {
  Keep(LaunchGatedRmsNorm({.x = Bf16(x),
                           .gate = Bf16(gate),
                           .weight = GatedNormWeight(weight, profile_.gated_norm),
                           .out = Bf16(out),
                           .rows = x.rows,
                           .heads = x.width / head_dim,
                           .head_dim = head_dim,
                           .x_stride = x.stride,
                           .gate_stride = gate.stride,
                           .out_stride = out.stride,
                           .eps = eps,
                           .casts = profile_.gated_norm},
                          stream_));
}

}  // namespace lockstep::cuda

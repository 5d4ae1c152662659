#include "kernels/cpu/embedding.h"

#include <cstring>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/host_matrix.h"
#include "kernels/cpu/linear_weight.h"
#include "kernels/cpu/row_grain.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

// What CpuEmbed reads rows from.
class CpuRowTable : public EmbeddingTable {
 public:
  virtual DType dtype() const = 0;  // kBF16 or kF32
  virtual void Read(int64_t row, float* to) const = 0;
};

class CpuEmbeddingTable final : public CpuRowTable {
 public:
  CpuEmbeddingTable(int64_t vocab, int64_t hidden, DType dtype)
      : vocab_(vocab), hidden_(hidden), dtype_(dtype), data_(vocab * hidden * DTypeBytes(dtype)) {}

  int64_t vocab() const override { return vocab_; }
  int64_t hidden() const override { return hidden_; }
  int64_t bytes() const override { return data_.bytes(); }

  DType dtype() const override { return dtype_; }
  void Read(int64_t r, float* to) const override {
    if (dtype_ == DType::kF32) {
      std::memcpy(to, row<float>(r), hidden_ * sizeof(float));
    } else {
      const uint16_t* from = row<uint16_t>(r);
      for (int64_t i = 0; i < hidden_; ++i) to[i] = Bf16ToF32(from[i]);
    }
  }
  template <class T>
  T* row(int64_t r) const {
    return reinterpret_cast<T*>(data_.data()) + r * hidden_;
  }

 private:
  const int64_t vocab_;
  const int64_t hidden_;
  const DType dtype_;
  const AlignedBuffer data_;
};

class CpuTiedTable final : public CpuRowTable {
 public:
  explicit CpuTiedTable(const CpuLinearWeight& head) : head_(head) {}
  int64_t vocab() const override { return head_.out_features(); }
  int64_t hidden() const override { return head_.in_features(); }
  int64_t bytes() const override { return 0; }
  DType dtype() const override { return head_.layout() == PanelLayout::kF32 ? DType::kF32 : DType::kBF16; }
  void Read(int64_t row, float* to) const override { ReadFeature(head_, row, 0, hidden(), to); }

 private:
  const CpuLinearWeight& head_;
};

}  // namespace

std::unique_ptr<EmbeddingTable> CpuPackEmbedding(const CpuContext& ctx, const HostMatrix& table) {
  LOCKSTEP_CHECK(table.data != nullptr && table.rows > 0 && table.cols > 0, "PackEmbedding: empty table [{}, {}]",
                 table.rows, table.cols);
  auto packed = std::make_unique<CpuEmbeddingTable>(table.rows, table.cols, ctx.profile.embedding);
  CpuStoreEmbedding(ctx, table, *packed);
  return packed;
}

void CpuStoreEmbedding(const CpuContext& ctx, const HostMatrix& table, EmbeddingTable& to) {
  auto* packed = &static_cast<CpuEmbeddingTable&>(to);
  LOCKSTEP_CHECK(table.rows == to.vocab() && table.cols == to.hidden(), "StoreEmbedding: [{}, {}] into [{}, {}]",
                 table.rows, table.cols, to.vocab(), to.hidden());
  ctx.threads.ParallelFor(table.rows, RowGrain(table.cols), [&](int64_t begin, int64_t end, int thread) {
    float* values = ctx.scratch.Floats(thread, table.cols);
    for (int64_t r = begin; r < end; ++r) {
      ReadRow(table, r, 0, table.cols, values);
      if (packed->dtype() == DType::kF32) {
        std::memcpy(packed->row<float>(r), values, table.cols * sizeof(float));
      } else {
        uint16_t* row = packed->row<uint16_t>(r);
        for (int64_t i = 0; i < table.cols; ++i) row[i] = F32ToBf16(values[i]);
      }
    }
  });
}

std::byte* CpuEmbeddingMemory(EmbeddingTable& table) {
  return static_cast<CpuEmbeddingTable&>(table).row<std::byte>(0);
}

std::unique_ptr<EmbeddingTable> CpuTieEmbedding(const LinearWeight& head) {
  return std::make_unique<CpuTiedTable>(static_cast<const CpuLinearWeight&>(head));
}

void CpuEmbed(const CpuContext& ctx, std::span<const int32_t> tokens, const EmbeddingTable& table, Rows out) {
  const auto& packed = static_cast<const CpuRowTable&>(table);
  LOCKSTEP_CHECK(out.rows == static_cast<int64_t>(tokens.size()) && out.width == packed.hidden(),
                 "Embed: {} tokens, table [{}, {}], out [{}, {}]", tokens.size(), packed.vocab(), packed.hidden(),
                 out.rows, out.width);
  // bf16 rows are their own rounding; those of an fp32 table under a bf16 residual stream are rounded here.
  const bool round = packed.dtype() == DType::kF32 && ctx.profile.residual == DType::kBF16;
  ctx.threads.ParallelFor(out.rows, RowGrain(out.width), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t token = tokens[r];
      LOCKSTEP_CHECK(token >= 0 && token < packed.vocab(), "Embed: token {} of row {}, vocabulary {}", token, r,
                     packed.vocab());
      float* to = out.row(r);
      packed.Read(token, to);
      for (int64_t i = 0; round && i < out.width; ++i) to[i] = RoundBf16(to[i]);
    }
  });
}

}  // namespace lockstep

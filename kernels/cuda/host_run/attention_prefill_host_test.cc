// The prefill kernel's own source on a CPU, against the oracle's rows (a GPU's bits): whole sequences, pieces that
// begin anywhere, grouped heads, windows, pages of any size.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/host_run/poisoned_memory.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/attention.h"

namespace lockstep::cuda {
namespace {

constexpr int kDim = 128;
constexpr int32_t kNoPage = 0x3FFFFFFF;
const float kScale = 1.0f / std::sqrt(128.0f);

using Bits = std::vector<uint16_t>;

// A sequence's rows [position, position + rows) that a step computes; those before are in the cache.
struct Rows {
  int position, rows;
};

struct Shape {
  int64_t heads, kv_heads, page_size, window;
};

class Prefill {
 public:
  Prefill(const Shape& shape, std::vector<Rows> pieces) : shape_(shape), pieces_(std::move(pieces)) {
    const int64_t page_bytes = KvPageBytes(shape.kv_heads, shape.page_size) + 256;
    int64_t pages = 0;
    for (const Rows& piece : pieces_) pages += (piece.position + piece.rows + shape.page_size - 1) / shape.page_size;
    cache_ = host_run::Allocate(pages * page_bytes);
    kv_ = {.base = cache_.get(),
           .page_count = pages,
           .page_bytes = page_bytes,
           .page_size = shape.page_size,
           .kv_heads = shape.kv_heads};
    for (const Rows& piece : pieces_) {
      const int keys = piece.position + piece.rows;
      k_.push_back(Random(keys * shape.kv_heads * kDim));
      v_.push_back(Random(keys * shape.kv_heads * kDim));
      q_.push_back(Random(piece.rows * shape.heads * kDim));
      const auto page_begin = static_cast<int32_t>(table_.size());
      for (int page = 0; page * shape.page_size < keys; ++page) table_.push_back(--pages);
      for (int position = 0; position < keys; ++position) {
        std::byte* page = cache_.get() + table_[page_begin + position / shape.page_size] * page_bytes;
        for (int64_t h = 0; h < 2 * shape.kv_heads; ++h) {
          const Bits& from = h < shape.kv_heads ? k_.back() : v_.back();
          for (int64_t chunk = 0; chunk < kDim / 8; ++chunk) {
            std::memcpy(page + h * shape.page_size * kKvRowBytes + KvChunkOffset(position % shape.page_size, chunk),
                        &from[(position * shape.kv_heads + h % shape.kv_heads) * kDim + 8 * chunk], 16);
          }
        }
      }
      const auto index = static_cast<int32_t>(device_pieces_.size());
      for (int done = 0; done < piece.rows;) {
        const int position = piece.position + done;
        const int count = std::min(piece.rows - done, 64 - position % 64);
        tiles_.push_back({.piece = index, .row_begin = rows_ + done, .row_count = count, .position = position});
        done += count;
      }
      device_pieces_.push_back(
          {.row_begin = rows_, .row_count = piece.rows, .position = piece.position, .page_begin = page_begin});
      rows_ += piece.rows;
      table_.push_back(kNoPage);
    }
    tiles_.resize(tiles_.size() + 2);  // padding
  }

  Bits Run(AttentionProgram program) const {
    const int64_t width = shape_.heads * kDim;
    Bits q;
    for (const Bits& rows : q_) q.insert(q.end(), rows.begin(), rows.end());
    Bits out((rows_ + 1) * width, 0x7FC1);
    const absl::Status status =
        LaunchAttentionPrefill({.program = program,
                                .batch = {.pieces = device_pieces_.data(),
                                          .tiles = tiles_.data(),
                                          .pages = table_.data(),
                                          .rows = rows_ + 1,
                                          .piece_count = static_cast<int32_t>(device_pieces_.size()),
                                          .tile_count = static_cast<int32_t>(tiles_.size())},
                                .q = reinterpret_cast<const __nv_bfloat16*>(q.data()),
                                .out = reinterpret_cast<__nv_bfloat16*>(out.data()),
                                .q_stride = width,
                                .out_stride = width,
                                .kv = kv_,
                                .heads = shape_.heads,
                                .window = shape_.window,
                                .scale = kScale},
                               nullptr);
    EXPECT_TRUE(status.ok()) << status;
    for (int64_t i = rows_ * width; i < (rows_ + 1) * width; ++i) EXPECT_EQ(out[i], 0x7FC1) << "padding was written";
    out.resize(rows_ * width);
    return out;
  }

  Bits Oracle(oracle::AttentionOrder order) const {
    Bits out(rows_ * shape_.heads * kDim);
    const int64_t group = shape_.heads / shape_.kv_heads;
    uint16_t* row = out.data();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      for (int r = 0; r < pieces_[i].rows; ++r) {
        for (int64_t h = 0; h < shape_.heads; ++h, row += kDim) {
          oracle::AttentionRow({.head_dim = kDim,
                                .k = &k_[i][h / group * kDim],
                                .v = &v_[i][h / group * kDim],
                                .key_stride = shape_.kv_heads * kDim,
                                .scale = kScale},
                               order, &q_[i][(r * shape_.heads + h) * kDim], pieces_[i].position + r,
                               static_cast<int>(shape_.window), row);
        }
      }
    }
    return out;
  }

 private:
  Bits Random(int64_t count) {
    std::normal_distribution<float> normal;
    Bits bits(count);
    for (uint16_t& b : bits) b = F32ToBf16(normal(random_));
    return bits;
  }

  const Shape shape_;
  const std::vector<Rows> pieces_;
  std::mt19937 random_{3};
  host_run::Memory cache_;
  KvPages kv_;
  std::vector<Bits> k_, v_, q_;
  std::vector<DevicePiece> device_pieces_;
  std::vector<DeviceTile> tiles_;
  std::vector<int32_t> table_;
  int32_t rows_ = 0;
};

void ExpectTheGpusBits(const Shape& shape, const std::vector<Rows>& pieces) {
  const Prefill prefill(shape, pieces);
  EXPECT_EQ(prefill.Run(AttentionProgram::kCudnn), prefill.Oracle(oracle::kCudnnOrder));
  EXPECT_EQ(prefill.Run(AttentionProgram::kFa2), prefill.Oracle(oracle::kFlash2Order));
}

TEST(AttentionPrefillOnACpu, HasTheGpusBits) {
  ExpectTheGpusBits({.heads = 1, .kv_heads = 1, .page_size = 64, .window = 0}, {{0, 1}, {0, 270}, {0, 64}});
}

TEST(AttentionPrefillOnACpu, PiecesBeginAnywhere) {
  ExpectTheGpusBits({.heads = 2, .kv_heads = 1, .page_size = 192, .window = 0}, {{130, 70}, {63, 2}, {600, 5}});
}

TEST(AttentionPrefillOnACpu, WindowsHideWhatLiesBefore) {
  ExpectTheGpusBits({.heads = 1, .kv_heads = 1, .page_size = 64, .window = 70}, {{0, 140}, {300, 90}});
  ExpectTheGpusBits({.heads = 1, .kv_heads = 1, .page_size = 128, .window = 1}, {{190, 20}});
}

}  // namespace
}  // namespace lockstep::cuda

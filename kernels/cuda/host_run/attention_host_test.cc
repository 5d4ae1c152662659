// The attention decode kernels' own source on a CPU, against the oracle's rows (a GPU's bits): whole, spread, and with
// keys and values that pieces share.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/batch_shares.h"
#include "kernels/cuda/host_run/poisoned_memory.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/attention.h"

namespace lockstep::cuda {
namespace {

constexpr int kDim = 128;
constexpr int32_t kNoPage = 0x3FFFFFFF;
const float kScale = 1.0f / std::sqrt(128.0f);

using Bits = std::vector<uint16_t>;

using host_run::Allocate;
using host_run::Memory;

// Sequences of random keys and values in pages; a sequence may begin with the pages of an earlier one.
class Cache {
 public:
  Cache(int64_t heads, int64_t page_size, int64_t window = 0) : heads_(heads), page_size_(page_size), window_(window) {}

  // A sequence whose decode row is at `position`, its first `shared` positions (whole pages) those of sequence `of`.
  void Add(int position, int shared = 0, int of = 0) {
    Sequence sequence = {.position = position, .k = {}, .v = {}, .q = Random(heads_ * kDim), .table = {}};
    const int64_t row = heads_ * kDim;
    if (shared > 0) {
      const Sequence& other = sequences_[of];
      sequence.k.assign(other.k.begin(), other.k.begin() + shared * row);
      sequence.v.assign(other.v.begin(), other.v.begin() + shared * row);
      sequence.table.assign(other.table.begin(), other.table.begin() + shared / page_size_);
    }
    const Bits k = Random((position + 1 - shared) * row), v = Random((position + 1 - shared) * row);
    sequence.k.insert(sequence.k.end(), k.begin(), k.end());
    sequence.v.insert(sequence.v.end(), v.begin(), v.end());
    while (static_cast<int64_t>(sequence.table.size()) * page_size_ <= position) sequence.table.push_back(pages_++);
    sequences_.push_back(std::move(sequence));
  }

  // The rows' attention by the kernels. `spread`: with the workspace that lets few pieces be spread. `shared`: with
  // what FindShares() finds, and page tables that are good for nothing where a kernel is not to look.
  Bits Run(AttentionProgram program, bool spread, bool shared) {
    const int64_t count = static_cast<int64_t>(sequences_.size()), width = heads_ * kDim;
    const KvPages kv = Pages();
    std::vector<Piece> host_pieces;
    std::vector<DevicePiece> pieces;
    std::vector<int32_t> tables;
    Bits q;
    for (int64_t i = 0; i < count; ++i) {
      const Sequence& sequence = sequences_[i];
      host_pieces.push_back({.row_begin = i,
                             .row_count = 1,
                             .position = sequence.position,
                             .page_table = sequence.table.data(),
                             .slot = 0});
      pieces.push_back({.row_begin = static_cast<int32_t>(i),
                        .row_count = 1,
                        .position = sequence.position,
                        .page_begin = static_cast<int32_t>(tables.size())});
      tables.insert(tables.end(), sequence.table.begin(), sequence.table.end());
      tables.push_back(kNoPage);
      q.insert(q.end(), sequence.q.begin(), sequence.q.end());
    }
    pieces.emplace_back();  // padding
    std::vector<DeviceShare> shares(shared ? count / 2 + 1 : 0);
    found_ = shared ? ShareFinder().Find(host_pieces, page_size_, shares) : 0;
    for (const DeviceShare& share : std::span(shares).first(found_)) {
      for (int i = 0; i < share.count; ++i) {
        DevicePiece& piece = pieces[share.pieces[i]];
        piece.shared = share.positions;
        if (i == 0 || program == AttentionProgram::kFa2 || (window_ > 0 && piece.position >= window_)) continue;
        std::fill_n(tables.begin() + piece.page_begin, share.positions / page_size_, kNoPage);
      }
    }
    Bits out((count + 1) * width, 0x7FC0);
    DeviceBatch batch = {.pieces = pieces.data(),
                         .shares = shares.data(),
                         .pages = tables.data(),
                         .rows = static_cast<int32_t>(count + 1),
                         .piece_count = static_cast<int32_t>(count + 1),
                         .decode_pieces = static_cast<int32_t>(count + 1),
                         .share_count = static_cast<int32_t>(shares.size())};
    constexpr int64_t kPositions = 4096;
    const int64_t bytes = spread || shared ? AttentionWorkspaceBytes(batch, heads_, heads_, kPositions) : 0;
    EXPECT_TRUE(bytes > 0 || !(spread || shared)) << "neither spread nor shared";
    const Memory workspace = Allocate(bytes);
    const Memory queries = Allocate(q.size() * 2);
    std::memcpy(queries.get(), q.data(), q.size() * 2);
    const Memory result = Allocate(out.size() * 2);
    const absl::Status status = LaunchAttentionDecode({.program = program,
                                                       .batch = batch,
                                                       .q = reinterpret_cast<const __nv_bfloat16*>(queries.get()),
                                                       .out = reinterpret_cast<__nv_bfloat16*>(result.get()),
                                                       .q_stride = width,
                                                       .out_stride = width,
                                                       .kv = kv,
                                                       .heads = heads_,
                                                       .window = window_,
                                                       .scale = kScale,
                                                       .workspace = bytes > 0 ? workspace.get() : nullptr,
                                                       .workspace_bytes = bytes,
                                                       .max_positions = kPositions},
                                                      nullptr);
    EXPECT_TRUE(status.ok()) << status;
    std::memcpy(out.data(), result.get(), out.size() * 2);
    for (int64_t i = count * width; i < (count + 1) * width; ++i) EXPECT_EQ(out[i], 0xFFFF) << "padding was written";
    out.resize(count * width);
    return out;
  }

  Bits Oracle(oracle::AttentionOrder order) const {
    Bits out;
    for (const Sequence& sequence : sequences_) {
      for (int64_t h = 0; h < heads_; ++h) {
        Bits row(kDim);
        oracle::AttentionRow({.head_dim = kDim,
                              .k = &sequence.k[h * kDim],
                              .v = &sequence.v[h * kDim],
                              .key_stride = heads_ * kDim,
                              .scale = kScale},
                             order, &sequence.q[h * kDim], sequence.position, static_cast<int>(window_), row.data());
        out.insert(out.end(), row.begin(), row.end());
      }
    }
    return out;
  }

  int64_t found() const { return found_; }  // shares of the last Run()

 private:
  struct Sequence {
    int position;
    Bits k, v, q;
    std::vector<int32_t> table;
  };

  Bits Random(int64_t count) {
    std::normal_distribution<float> normal;
    Bits bits(count);
    for (uint16_t& b : bits) b = F32ToBf16(normal(random_));
    return bits;
  }
  KvPages Pages() {
    const int64_t page_bytes = KvPageBytes(heads_, page_size_) + 256;
    memory_ = Allocate(pages_ * page_bytes);
    for (const Sequence& sequence : sequences_) {
      for (int64_t position = 0; position <= sequence.position; ++position) {
        for (int64_t h = 0; h < 2 * heads_; ++h) {
          const Bits& from = h < heads_ ? sequence.k : sequence.v;
          std::byte* head =
              memory_.get() + sequence.table[position / page_size_] * page_bytes + h * page_size_ * kKvRowBytes;
          for (int64_t chunk = 0; chunk < kDim / 8; ++chunk) {
            std::memcpy(head + KvChunkOffset(position % page_size_, chunk),
                        &from[(position * heads_ + h % heads_) * kDim + 8 * chunk], 16);
          }
        }
      }
    }
    return {.base = memory_.get(),
            .page_count = pages_,
            .page_bytes = page_bytes,
            .page_size = page_size_,
            .kv_heads = heads_};
  }

  const int64_t heads_, page_size_, window_;
  std::mt19937 random_{7};
  std::vector<Sequence> sequences_;
  Memory memory_;
  int32_t pages_ = 0;
  int64_t found_ = 0;
};

TEST(AttentionDecodeOnACpu, HasTheGpusBits) {
  for (const int64_t window : {0, 100}) {
    Cache cache(2, 64, window);
    for (const int position : {0, 5, 63, 64, 127, 128, 200, 300}) cache.Add(position);
    for (const bool spread : {false, true}) {
      SCOPED_TRACE(testing::Message() << "window " << window << (spread ? ", spread" : ""));
      EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, spread, false), cache.Oracle(oracle::kCudnnOrder));
      EXPECT_EQ(cache.Run(AttentionProgram::kFa2, spread, false), cache.Oracle(oracle::kFlash2Order));
    }
  }
}

// 44 units: the values are taken in halves of the head dimension, not in quarters.
TEST(AttentionDecodeOnACpu, HalvesOfTheHeadDimensionHaveTheGpusBits) {
  Cache cache(11, 64);
  for (const int position : {5, 200, 300}) cache.Add(position);
  EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, true, false), cache.Oracle(oracle::kCudnnOrder));
  EXPECT_EQ(cache.Run(AttentionProgram::kFa2, true, false), cache.Oracle(oracle::kFlash2Order));
}

// More tiles than a block weighs, and than a ring holds.
TEST(AttentionDecodeOnACpu, ALongSpreadRowHasTheGpusBits) {
  Cache cache(1, 128);
  cache.Add(2500);
  EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, true, false), cache.Oracle(oracle::kCudnnOrder));
  EXPECT_EQ(cache.Run(AttentionProgram::kFa2, true, false), cache.Oracle(oracle::kFlash2Order));
}

// As many blocks as are two and three to a multiprocessor: shorter rings, which the long row goes round.
TEST(AttentionDecodeOnACpu, ShorterRingsHaveTheGpusBits) {
  for (const int others : {11, 22}) {  // with one of padding 156 and 288 blocks
    SCOPED_TRACE(others);
    Cache cache(12, 192, 270);  // of its first tile the long row sees a half
    cache.Add(470);
    for (int i = 0; i < others; ++i) cache.Add(i);
    EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, false, false), cache.Oracle(oracle::kCudnnOrder));
    EXPECT_EQ(cache.Run(AttentionProgram::kFa2, false, false), cache.Oracle(oracle::kFlash2Order));
  }
}

// 12 pieces of 7 heads: too many to be spread.
void AddGroups(Cache& cache) {
  cache.Add(520);
  cache.Add(384, 384, 0);  // its row is the first after what it shares
  cache.Add(40);           // alone
  cache.Add(515, 512, 0);
  cache.Add(600, 384, 0);
  cache.Add(300);
  cache.Add(301, 256, 5);
  for (int i = 0; i < 5; ++i) cache.Add(530 + i, 512, 0);
}

TEST(AttentionDecodeOnACpu, SharedKeysAndValuesChangeNoBit) {
  Cache cache(7, 64);
  AddGroups(cache);
  EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, false, true), cache.Oracle(oracle::kCudnnOrder));
  EXPECT_EQ(cache.found(), 2);
  EXPECT_EQ(cache.Run(AttentionProgram::kFa2, false, true), cache.Oracle(oracle::kFlash2Order));
}

// Rows beyond the window see a part of the shared keys: they go alone.
TEST(AttentionDecodeOnACpu, RowsThatAWindowCutsOffShareNothing) {
  Cache cache(7, 128, 522);
  AddGroups(cache);
  EXPECT_EQ(cache.Run(AttentionProgram::kCudnn, false, true), cache.Oracle(oracle::kCudnnOrder));
  EXPECT_GT(cache.found(), 0);
}

}  // namespace
}  // namespace lockstep::cuda

// Paged attention and its cache: against an fp64 oracle, and decode, spread decode and prefill in any cut against each
// other in bits (PyTorch's bits: tests/gpu/check_attention.py). Unwritten positions are NaN, unused page-table entries
// point far outside. Validate()'s tests need no GPU; the others skip without one.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/batch_shares.h"
#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/kv_cache.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kDim = 128;
constexpr int32_t kPoisonPage = 0x3FFFFFFF;
constexpr int64_t kFusedPad = 8;  // columns of a fused row beside k and v
constexpr AttentionProgram kPrograms[] = {AttentionProgram::kCudnn, AttentionProgram::kFa2,
                                          AttentionProgram::kCudnnMask};
const float kScale = 1.0f / std::sqrt(128.0f);

struct Shape {
  int64_t heads = 2;
  int64_t kv_heads = 2;
  int64_t page_size = 64;
  int64_t window = 0;
  AttentionProgram program = AttentionProgram::kCudnn;

  std::string Name() const {
    return testing::PrintToString(std::vector<int64_t>{heads, kv_heads, page_size, window, static_cast<int>(program)});
  }
};

struct Span {
  int sequence, position, count;
};

// Sequences of random q, k, v, with a cache of their pages in random order.
class Sequences {
 public:
  Sequences(const Shape& shape, std::vector<int> lengths, uint32_t seed = 1)
      : shape_(shape), lengths_(std::move(lengths)), page_bytes_(KvPageBytes(shape.kv_heads, shape.page_size) + 768) {
    for (size_t s = 0; s < lengths_.size(); ++s) {
      q_.push_back(RandomBits(lengths_[s] * shape.heads * kDim, seed * 100 + 3 * s));
      k_.push_back(RandomBits(lengths_[s] * shape.kv_heads * kDim, seed * 100 + 3 * s + 1));
      v_.push_back(RandomBits(lengths_[s] * shape.kv_heads * kDim, seed * 100 + 3 * s + 2));
      tables_.emplace_back((lengths_[s] + shape.page_size - 1) / shape.page_size);
      page_count_ += static_cast<int64_t>(tables_.back().size());
    }
    ++page_count_;  // one that no sequence has
    std::vector<int32_t> order(page_count_);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    size_t next = 0;
    for (std::vector<int32_t>& table : tables_) {
      for (int32_t& page : table) page = order[next++];
    }
    cache_ = std::make_unique<DeviceArray<uint16_t>>(Bits(page_count_ * page_bytes_ / 2, kPoison));
  }

  // The rows of `decode`, then of `prefill`, into `rows` [rows, width] from each sequence's `data`.
  static Bits Gather(const std::vector<Bits>& data, int64_t width, const std::vector<Span>& spans) {
    Bits rows;
    for (const Span& span : spans) {
      const auto from = data[span.sequence].begin() + span.position * width;
      rows.insert(rows.end(), from, from + span.count * width);
    }
    return rows;
  }

  // What attention may do with decode pieces.
  enum class Decode { kPlain, kSpread, kShared };

  // Stores the rows' k and v and returns their attention [rows, heads * 128].
  Bits Run(const std::vector<Span>& decode, const std::vector<Span>& prefill, bool write = true,
           Decode how = Decode::kPlain) {
    std::vector<Span> spans = decode;
    spans.insert(spans.end(), prefill.begin(), prefill.end());
    std::vector<DevicePiece> pieces;
    std::vector<DeviceTile> tiles;
    std::vector<int32_t> pages, positions, row_piece;
    int32_t rows = 0;
    for (size_t i = 0; i < spans.size(); ++i) {
      const Span& span = spans[i];
      pieces.push_back({.row_begin = rows,
                        .row_count = span.count,
                        .position = span.position,
                        .page_begin = static_cast<int32_t>(pages.size())});
      const int64_t used = (span.position + span.count + shape_.page_size - 1) / shape_.page_size;
      const std::vector<int32_t>& table = tables_[span.sequence];
      pages.insert(pages.end(), table.begin(), table.begin() + used);
      pages.insert(pages.end(), 3, kPoisonPage);
      for (int r = 0; r < span.count; ++r) {
        positions.push_back(span.position + r);
        row_piece.push_back(static_cast<int32_t>(i));
      }
      for (int done = 0; i >= decode.size() && done < span.count;) {
        const int position = span.position + done;
        const int count = std::min(span.count - done, 64 - position % 64);
        tiles.push_back(
            {.piece = static_cast<int32_t>(i), .row_begin = rows + done, .row_count = count, .position = position});
        done += count;
      }
      rows += span.count;
    }
    std::vector<DeviceShare> shares;
    if (how == Decode::kShared) {
      std::vector<Piece> host_pieces;
      for (size_t i = 0; i < decode.size(); ++i) {
        host_pieces.push_back({.row_begin = static_cast<int64_t>(i),
                               .row_count = 1,
                               .position = decode[i].position,
                               .page_table = &pages[pieces[i].page_begin]});
      }
      shares.resize(MaxShares(static_cast<int64_t>(decode.size())));
      const int64_t found = ShareFinder().Find(host_pieces, shape_.page_size, shares);
      EXPECT_GT(found, 0);
      for (const DeviceShare& share : std::span(shares).first(found)) {
        for (int i = 0; i < share.count; ++i) pieces[share.pieces[i]].shared = share.positions;
      }
    }
    // Padding, as a captured batch has it.
    const auto decode_pieces = static_cast<int32_t>(decode.size() + (prefill.empty() ? 2 : 0));
    if (prefill.empty()) pieces.resize(pieces.size() + 2);
    const int padded_rows = rows + 2;
    positions.insert(positions.end(), 2, kPoisonPage);
    row_piece.insert(row_piece.end(), 2, -1);
    tiles.resize(tiles.size() + 2);
    const DeviceArray<DevicePiece> device_pieces(pieces);
    const DeviceArray<DeviceTile> device_tiles(tiles);
    const DeviceArray<int32_t> device_pages(pages), device_positions(positions), device_row_piece(row_piece);
    const DeviceArray<DeviceShare> device_shares(shares);
    const DeviceBatch batch = {.pieces = device_pieces.data(),
                               .tiles = device_tiles.data(),
                               .shares = device_shares.data(),
                               .pages = device_pages.data(),
                               .positions = device_positions.data(),
                               .row_piece = device_row_piece.data(),
                               .rows = padded_rows,
                               .piece_count = static_cast<int32_t>(pieces.size()),
                               .decode_pieces = decode_pieces,
                               .tile_count = static_cast<int32_t>(tiles.size()),
                               .share_count = static_cast<int32_t>(shares.size())};
    const int64_t kv_width = shape_.kv_heads * kDim;
    const int64_t fused = 2 * kv_width + kFusedPad;
    if (write) {
      const Bits k = Gather(k_, kv_width, spans);
      const Bits v = Gather(v_, kv_width, spans);
      Bits wide(padded_rows * fused, kPoison);
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(k.begin() + r * kv_width, kv_width, wide.begin() + r * fused);
        std::copy_n(v.begin() + r * kv_width, kv_width, wide.begin() + r * fused + kv_width);
      }
      const DeviceArray<uint16_t> device_wide(wide);
      const WriteKvParams params = {.batch = batch,
                                    .k = device_wide.bf16(),
                                    .v = device_wide.bf16() + kv_width,
                                    .k_stride = fused,
                                    .v_stride = fused,
                                    .kv = Kv()};
      const absl::Status status = LaunchWriteKv(params, nullptr);
      EXPECT_TRUE(status.ok()) << status.ToString();
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
    const int64_t width = shape_.heads * kDim;
    Bits q = Gather(q_, width, spans);
    q.resize(padded_rows * width, kPoison);
    const DeviceArray<uint16_t> device_q(q);
    const DeviceArray<uint16_t> out(Bits(q.size(), kPoison));
    const int64_t max_positions = *std::max_element(lengths_.begin(), lengths_.end());
    const int64_t bytes =
        how == Decode::kPlain ? 0 : AttentionWorkspaceBytes(batch, shape_.heads, shape_.kv_heads, max_positions);
    EXPECT_EQ(how != Decode::kPlain, bytes > 0);
    const DeviceArray<uint8_t> device_workspace(std::vector<uint8_t>(bytes, 0xFF));
    const AttentionParams params = {.program = shape_.program,
                                    .batch = batch,
                                    .q = device_q.bf16(),
                                    .out = out.bf16(),
                                    .q_stride = width,
                                    .out_stride = width,
                                    .kv = Kv(),
                                    .heads = shape_.heads,
                                    .window = shape_.window,
                                    .scale = kScale,
                                    .workspace = bytes > 0 ? device_workspace.data() : nullptr,
                                    .workspace_bytes = bytes,
                                    .max_positions = max_positions};
    const absl::Status status = LaunchAttention(params, nullptr);
    EXPECT_TRUE(status.ok()) << status.ToString();
    Bits got = out.Host();
    for (size_t i = rows * width; i < got.size(); ++i) EXPECT_EQ(got[i], kPoison) << "a padding row was written";
    got.resize(rows * width);
    return got;
  }

  Bits Whole() {
    std::vector<Span> all;
    for (size_t s = 0; s < lengths_.size(); ++s) all.push_back({static_cast<int>(s), 0, lengths_[s]});
    return Run({}, all);
  }

  // Elements further from the fp64 attention than the roundings allow.
  size_t OutsideOracle(const Bits& out) const;

  KvPages Kv() const {
    return {.base = reinterpret_cast<std::byte*>(cache_->data()),
            .page_count = page_count_,
            .page_bytes = page_bytes_,
            .page_size = shape_.page_size,
            .kv_heads = shape_.kv_heads};
  }

  Bits Cache() const { return cache_->Host(); }
  // Element of the cache where (sequence, position, kv head, dim)'s key is; its value is kv_heads pages' rows further.
  int64_t KeyAt(int sequence, int position, int64_t head, int64_t dim) const {
    return tables_[sequence][position / shape_.page_size] * page_bytes_ / 2 + head * shape_.page_size * kDim +
           KvChunkOffset(position % shape_.page_size, dim / 8) / 2 + dim % 8;
  }
  const Bits& k(int sequence) const { return k_[sequence]; }
  const Bits& v(int sequence) const { return v_[sequence]; }

 private:
  Shape shape_;
  std::vector<int> lengths_;
  int64_t page_bytes_;
  int64_t page_count_ = 0;
  std::vector<Bits> q_, k_, v_;
  std::vector<std::vector<int32_t>> tables_;
  std::unique_ptr<DeviceArray<uint16_t>> cache_;
};

// One rounding to bf16 is 2^-8 of the value at most: of the weights before they meet the values, and of the output.
// An error d of an exponent moves its weight by d (in units of ln 2 below 1); d is c times the score's, a chain of 8
// steps that each lose 2^-22 of the largest term, and three roundings of a number of the score's size. The values'
// chain loses 2^-22 of its size a step.
size_t Sequences::OutsideOracle(const Bits& out) const {
  size_t outside = 0;
  const int64_t group = shape_.heads / shape_.kv_heads;
  int64_t row = 0;
  for (size_t s = 0; s < lengths_.size(); ++s) {
    for (int t = 0; t < lengths_[s]; ++t, ++row) {
      const int first = shape_.window > 0 ? std::max<int>(0, t - static_cast<int>(shape_.window) + 1) : 0;
      for (int64_t h = 0; h < shape_.heads; ++h) {
        const auto at = [&](const Bits& data, int position, int64_t d) {
          return static_cast<double>(Bf16ToF32(data[(position * shape_.kv_heads + h / group) * kDim + d]));
        };
        std::vector<double> weight(t + 1 - first);
        double most = -INFINITY, exponent_error = 0.0, sum = 0.0;
        for (int j = first; j <= t; ++j) {
          double score = 0.0, size = 0.0;
          for (int64_t d = 0; d < kDim; ++d) {
            const double term = Bf16ToF32(q_[s][(t * shape_.heads + h) * kDim + d]) * at(k_[s], j, d);
            score += term;
            size += std::abs(term);
          }
          weight[j - first] = score * kScale;
          most = std::max(most, score * kScale);
          exponent_error = std::max(exponent_error, size * kScale * (8 * 0x1p-22 + 3 * 0x1p-24));
        }
        for (double& w : weight) sum += w = std::exp(w - most);
        const double relative = 0x1p-8 + 2 * exponent_error + ((t + 1) / 16 + 8) * 0x1p-22;
        for (int64_t d = 0; d < kDim; ++d) {
          double want = 0.0, size = 0.0;
          for (int j = first; j <= t; ++j) {
            want += weight[j - first] / sum * at(v_[s], j, d);
            size += weight[j - first] / sum * std::abs(at(v_[s], j, d));
          }
          const double error = std::abs(Bf16ToF32(out[(row * shape_.heads + h) * kDim + d]) - want);
          outside += !(error <= std::abs(want) * 0x1p-8 + size * relative);  // a NaN counts
        }
      }
    }
  }
  return outside;
}

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const AttentionProgram program : kPrograms) {
    for (const int64_t window : {0, 1, 64, 100, 192}) {
      shapes.push_back({.heads = 2, .kv_heads = 2, .page_size = 64, .window = window, .program = program});
    }
    shapes.push_back({.heads = 6, .kv_heads = 2, .page_size = 128, .program = program});
    shapes.push_back({.heads = 12, .kv_heads = 1, .page_size = 192, .window = 70, .program = program});
  }
  return shapes;
}

class CudaAttention : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

TEST_F(CudaAttention, WriteKvStoresRowsAndNothingElse) {
  for (const int64_t page_size : {64, 128}) {
    SCOPED_TRACE(page_size);
    const std::vector<int> lengths = {70, 129};
    const Shape shape = {.heads = 3, .kv_heads = 3, .page_size = page_size};
    Sequences sequences(shape, lengths);
    Bits want = sequences.Cache();
    // Position 69 of the first sequence stays unwritten.
    sequences.Run({{0, 0, 1}}, {{0, 1, 68}, {1, 0, 129}});
    const int written[] = {69, 129};
    for (int s = 0; s < 2; ++s) {
      for (int t = 0; t < written[s]; ++t) {
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
          for (int64_t d = 0; d < kDim; ++d) {
            const int64_t at = sequences.KeyAt(s, t, h, d);
            want[at] = sequences.k(s)[(t * shape.kv_heads + h) * kDim + d];
            want[at + shape.kv_heads * page_size * kDim] = sequences.v(s)[(t * shape.kv_heads + h) * kDim + d];
          }
        }
      }
    }
    ExpectSameBits(sequences.Cache(), want);
  }
}

TEST_F(CudaAttention, NearTheOracle) {
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    Sequences sequences(shape, {1, 64, 65, 200, 270});
    EXPECT_EQ(sequences.OutsideOracle(sequences.Whole()), 0u);
  }
}

TEST_F(CudaAttention, DecodeHasPrefillsBits) {
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    constexpr int kLength = 390;
    Sequences sequences(shape, {kLength});
    const Bits whole = sequences.Whole();
    std::vector<Span> rows;
    for (int t = 0; t < kLength; ++t) rows.push_back({0, t, 1});
    ExpectSameBits(sequences.Run(rows, {}, /*write=*/false), whole);
  }
}

TEST_F(CudaAttention, SharedDecodeHasPrefillsBits) {
  for (const Shape& shape : Shapes()) {
    if (shape.heads != shape.kv_heads) continue;
    SCOPED_TRACE(shape.Name());
    constexpr int kLength = 700;
    Sequences sequences(shape, {kLength});
    const Bits whole = sequences.Whole();
    std::vector<Span> rows;
    for (int t = 0; t < kLength; ++t) rows.push_back({0, t, 1});
    ExpectSameBits(sequences.Run(rows, {}, /*write=*/false, Sequences::Decode::kShared), whole);
  }
}

TEST_F(CudaAttention, SpreadDecodeHasPrefillsBits) {
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    constexpr int kLength = 390;
    Sequences sequences(shape, {kLength});
    const Bits whole = sequences.Whole();
    const auto width = static_cast<int64_t>(whole.size()) / kLength;
    for (const int t : {0, 1, 15, 16, 63, 64, 99, 127, 128, 191, 192, 255, 256, 300, 389}) {
      SCOPED_TRACE(t);
      const Bits want(whole.begin() + t * width, whole.begin() + (t + 1) * width);
      ExpectSameBits(sequences.Run({{0, t, 1}}, {}, /*write=*/false, Sequences::Decode::kSpread), want);
    }
    Bits want(whole.begin() + 200 * width, whole.begin() + 201 * width);
    want.insert(want.end(), whole.begin() + 9 * width, whole.begin() + 10 * width);
    ExpectSameBits(sequences.Run({{0, 200, 1}, {0, 9, 1}}, {}, /*write=*/false, Sequences::Decode::kSpread), want);
  }
}

// Rows long enough that the rings go round several times; both numbers of parts of the head dimension.
TEST_F(CudaAttention, SpreadDecodeOfLongRowsHasPrefillsBits) {
  for (const AttentionProgram program : kPrograms) {
    for (const int64_t window : {int64_t{0}, int64_t{1500}}) {
      const Shape shape = {.heads = 10, .kv_heads = 10, .page_size = 64, .window = window, .program = program};
      SCOPED_TRACE(shape.Name());
      constexpr int kLength = 1850;
      Sequences sequences(shape, {kLength});
      const Bits whole = sequences.Whole();
      const int64_t width = static_cast<int64_t>(whole.size()) / kLength;
      std::vector<Span> rows;
      Bits want;
      for (const int t : {1849, 1407, 64, 1700}) {  // with two of padding 30 units, then 40 and more
        rows.push_back({0, t, 1});
        want.insert(want.end(), whole.begin() + t * width, whole.begin() + (t + 1) * width);
        ExpectSameBits(sequences.Run(rows, {}, /*write=*/false, Sequences::Decode::kSpread), want);
      }
    }
  }
}

// With one, two and three blocks on a multiprocessor: rings of three lengths.
TEST_F(CudaAttention, DecodeOfManySequencesHasPrefillsBits) {
  for (const AttentionProgram program : kPrograms) {
    const Shape shape = {.heads = 30, .kv_heads = 30, .page_size = 64, .program = program};
    SCOPED_TRACE(shape.Name());
    constexpr int kLength = 1100;
    Sequences sequences(shape, {kLength});
    const Bits whole = sequences.Whole();
    const int64_t width = static_cast<int64_t>(whole.size()) / kLength;
    for (const int count : {2, 5, 12}) {  // with two of padding 120, 210 and 420 blocks
      SCOPED_TRACE(count);
      std::vector<Span> rows;
      Bits want;
      for (int i = 0; i < count; ++i) {
        const int t = kLength - 1 - 83 * i;
        rows.push_back({0, t, 1});
        want.insert(want.end(), whole.begin() + t * width, whole.begin() + (t + 1) * width);
      }
      ExpectSameBits(sequences.Run(rows, {}, /*write=*/false), want);
    }
  }
}

// Sequences in pieces that begin anywhere, some of one row in decode, each step's rows beside other sequences'.
TEST_F(CudaAttention, AnyCutHasTheSameBits) {
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(shape.Name());
    const std::vector<int> lengths = {333, 64, 190, 1};
    Sequences whole(shape, lengths);
    Sequences cut(shape, lengths);
    const Bits want = whole.Whole();
    const int64_t width = shape.heads * kDim;
    std::vector<int64_t> first_row(lengths.size(), 0);
    for (size_t s = 1; s < lengths.size(); ++s) first_row[s] = first_row[s - 1] + lengths[s - 1];
    Bits got(want.size(), kPoison);
    std::vector<int> done(lengths.size(), 0);
    std::mt19937 random(7);
    while (done != lengths) {
      std::vector<Span> decode, prefill;
      for (size_t s = 0; s < lengths.size(); ++s) {
        if (done[s] == lengths[s] || random() % 4 == 0) continue;
        const int most = random() % 3 == 0 ? 1 : 130;
        const int count = std::min<int>(lengths[s] - done[s], 1 + static_cast<int>(random() % most));
        (count == 1 ? decode : prefill).push_back({static_cast<int>(s), done[s], count});
        done[s] += count;
      }
      if (decode.empty() && prefill.empty()) continue;
      const Bits out = cut.Run(decode, prefill);
      decode.insert(decode.end(), prefill.begin(), prefill.end());
      int64_t row = 0;
      for (const Span& span : decode) {
        std::copy_n(out.begin() + row * width, span.count * width,
                    got.begin() + (first_row[span.sequence] + span.position) * width);
        row += span.count;
      }
    }
    ExpectSameBits(got, want);
  }
}

// Rows that a window as long as the sequence hides nothing from.
TEST_F(CudaAttention, AWindowThatHidesNothingChangesNothing) {
  for (const AttentionProgram program : kPrograms) {
    Shape shape = {.program = program};
    const Bits want = Sequences(shape, {300}).Whole();
    shape.window = 300;
    ExpectSameBits(Sequences(shape, {300}).Whole(), want);
  }
}

const KvPages kGoodPages = {.base = reinterpret_cast<std::byte*>(4096),
                            .page_count = 10,
                            .page_bytes = KvPageBytes(2, 64),
                            .page_size = 64,
                            .kv_heads = 2};

DeviceBatch GoodBatch() {
  static const int32_t array[6] = {};
  return {.pieces = reinterpret_cast<const DevicePiece*>(array),
          .tiles = reinterpret_cast<const DeviceTile*>(array),
          .pages = array,
          .positions = array,
          .row_piece = array,
          .rows = 3,
          .piece_count = 2,
          .decode_pieces = 1,
          .tile_count = 1};
}

TEST(CudaParams, KvPagesNamesTheBadField) {
  using P = KvPages;
  ASSERT_TRUE(kGoodPages.Validate().ok());
  ExpectRefusedAfter(kGoodPages, ".base:", [](P& p) { p.base = nullptr; });
  ExpectRefusedAfter(kGoodPages, ".base:", [](P& p) { p.base += 64; });
  ExpectRefusedAfter(kGoodPages, ".kv_heads", [](P& p) { p.kv_heads = 0; });
  ExpectRefusedAfter(kGoodPages, ".page_size", [](P& p) { p.page_size = 96; });
  ExpectRefusedAfter(kGoodPages, ".page_size", [](P& p) { p.page_size = 0; });
  ExpectRefusedAfter(kGoodPages, ".page_bytes", [](P& p) { p.page_bytes -= 256; });
  ExpectRefusedAfter(kGoodPages, ".page_bytes", [](P& p) { p.page_bytes += 128; });
  ExpectRefusedAfter(kGoodPages, ".page_count", [](P& p) { p.page_count = 0; });
  ExpectRefusedAfter(kGoodPages, ".page_count", [](P& p) { p.page_count = int64_t{1} << 31; });
}

TEST(CudaParams, WriteKvNamesTheBadField) {
  using P = WriteKvParams;
  const P good = {
      .batch = GoodBatch(), .k = Address(), .v = Address(), .k_stride = 256, .v_stride = 264, .kv = kGoodPages};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".batch.rows", [](P& p) { p.batch.rows = -1; });
  ExpectRefusedAfter(good, ".k:", [](P& p) { p.k = nullptr; });
  ExpectRefusedAfter(good, ".v:", [](P& p) { p.v = Address(4104); });
  ExpectRefusedAfter(good, ".k_stride", [](P& p) { p.k_stride = 248; });
  ExpectRefusedAfter(good, ".v_stride", [](P& p) { p.v_stride = 260; });
  ExpectRefusedAfter(good, "KvPages.page_size", [](P& p) { p.kv.page_size = 32; });
  ExpectRefusedAfter(good, ".batch.pieces", [](P& p) { p.batch.pieces = nullptr; });
  ExpectRefusedAfter(good, ".batch.pages", [](P& p) { p.batch.pages = nullptr; });
  ExpectRefusedAfter(good, ".batch.positions", [](P& p) { p.batch.positions = nullptr; });
  ExpectRefusedAfter(good, ".batch.row_piece", [](P& p) { p.batch.row_piece = nullptr; });
}

DeviceBatch Pieces(int32_t decode_pieces, int32_t shares = 0) {
  DeviceBatch batch;
  batch.decode_pieces = decode_pieces;
  batch.share_count = shares;
  return batch;
}

TEST(CudaParams, AttentionNamesTheBadField) {
  using P = AttentionParams;
  const P good = {.batch = GoodBatch(),
                  .q = Address(),
                  .out = Address(),
                  .q_stride = 768,
                  .out_stride = 512,
                  .kv = kGoodPages,
                  .heads = 4,
                  .scale = kScale};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".program", [](P& p) { p.program = static_cast<AttentionProgram>(3); });
  ExpectRefusedAfter(good, ".heads", [](P& p) { p.heads = 3; });
  ExpectRefusedAfter(good, ".heads", [](P& p) { p.heads = 0; });
  ExpectRefusedAfter(good, ".window", [](P& p) { p.window = -1; });
  ExpectRefusedAfter(good, ".scale", [](P& p) { p.scale = 0.0f; });
  ExpectRefusedAfter(good, ".scale", [](P& p) { p.scale = NAN; });
  ExpectRefusedAfter(good, ".q:", [](P& p) { p.q = nullptr; });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = Address(4104); });
  ExpectRefusedAfter(good, ".q_stride", [](P& p) { p.q_stride = 504; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 516; });
  ExpectRefusedAfter(good, "KvPages.base", [](P& p) { p.kv.base = nullptr; });
  ExpectRefusedAfter(good, ".batch.decode_pieces", [](P& p) { p.batch.decode_pieces = 3; });
  ExpectRefusedAfter(good, ".batch.tile_count", [](P& p) { p.batch.tile_count = -1; });
  ExpectRefusedAfter(good, ".batch.pieces", [](P& p) { p.batch.pieces = nullptr; });
  ExpectRefusedAfter(good, ".batch.pages", [](P& p) { p.batch.pages = nullptr; });
  ExpectRefusedAfter(good, ".batch.tiles", [](P& p) { p.batch.tiles = nullptr; });
  ExpectRefusedAfter(good, ".batch.share_count", [](P& p) { p.batch.share_count = -1; });
  ExpectRefusedAfter(good, ".batch.shares", [](P& p) { p.batch.share_count = 1; });
  ExpectRefusedAfter(good, ".workspace:", [](P& p) { p.workspace = Address(4160); });
  ExpectRefusedAfter(good, ".max_positions", [](P& p) { p.workspace = Address(); });
  ExpectRefusedAfter(good, ".workspace_bytes", [](P& p) {
    p.workspace = Address();
    p.max_positions = 100;
    p.workspace_bytes = AttentionWorkspaceBytes(Pieces(1), 4, 2, 100) - 1;
  });
}

TEST(CudaParams, AttentionWorkspaceIsForFewSequencesAndForShares) {
  EXPECT_EQ(AttentionWorkspaceBytes(Pieces(32), 30, 30, 8192), 0);
  // Per head and 64 positions, 64 scores and 8 maxima, in whole lines of 32.
  EXPECT_EQ(AttentionWorkspaceBytes(Pieces(1), 30, 30, 8192), 30 * 128 * 96 * 4);
  // 12 query heads of a kv head are two units of up to 8; 8 times 64 scores and 8 maxima, likewise.
  EXPECT_EQ(AttentionWorkspaceBytes(Pieces(1), 12, 1, 1), 2 * 2 * 544 * 4);
  // Per row and head, 128 outputs, 4 sums, a maximum, 3 of padding.
  EXPECT_EQ(AttentionWorkspaceBytes(Pieces(32, 4), 30, 30, 8192), 32 * 30 * (128 + 8) * 4);
  EXPECT_EQ(AttentionWorkspaceBytes(Pieces(32, 4), 30, 15, 8192), 0);
}

}  // namespace
}  // namespace lockstep::cuda

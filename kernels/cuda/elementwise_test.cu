// Convolution, gates, gated norm, addition, gathered and non-finite rows against oracles written the long way on the
// CPU. Device tests skip without a GPU. Bits against the trainer's own operations: tests/gpu/check_elementwise.py.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cuda/add.h"
#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/gdn_conv.h"
#include "kernels/cuda/gdn_gates.h"

namespace lockstep::cuda {
namespace {

// Half a bf16 step at the foot of a binade, relative.
constexpr double kBf16Rounding = 0x1p-8;

double Value(uint16_t bits) {
  return Bf16ToF32(bits);
}

// `relative` and `absolute`: the error allowed; a NaN is outside.
void ExpectNear(const Bits& got, const std::vector<double>& want, double relative, double absolute = 0.0) {
  ASSERT_EQ(got.size(), want.size());
  size_t outside = 0;
  size_t first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (std::abs(Value(got[i]) - want[i]) <= std::abs(want[i]) * relative + absolute) continue;
    ++outside;
    first = i;
  }
  EXPECT_EQ(outside, 0u) << "of " << want.size() << "; the first at " << first << ": " << Value(got[first]) << ", want "
                         << want[first];
}

struct ConvShape {
  int64_t key_heads, key_dim, value_width;

  int64_t keys() const { return 2 * key_heads * key_dim; }
  int64_t channels() const { return keys() + value_width; }
};

// Rows of one sequence, in the order of its positions.
struct Sequence {
  Bits in;
  Bits out;
  int position = 0;  // rows done
};

// Sequences with their slots of tails, and steps over them.
class ConvRun {
 public:
  ConvRun(const ConvShape& shape, const std::vector<int64_t>& lengths, ConvCasts casts)
      : shape_(shape),
        casts_(casts),
        weight_(RandomBits(shape.channels() * kGdnConvWidth, 1, 0.4f)),
        tail_width_(3 * shape.channels() + 8),
        tails_(Bits(tail_width_ * (lengths.size() + 1), kPoison)) {
    for (size_t s = 0; s < lengths.size(); ++s) {
      sequences.push_back({.in = RandomBits(lengths[s] * shape.channels(), 100 + static_cast<uint32_t>(s)), .out = {}});
    }
  }

  // rows[s] more rows of each sequence; those of one row are decode pieces if `decode`. Pieces without rows, as in a
  // captured batch, stand between them, and padding rows after them.
  void Step(const std::vector<int>& rows, bool decode) {
    std::vector<DevicePiece> pieces;
    std::vector<DeviceTile> tiles;
    std::vector<size_t> order;
    const int64_t channels = shape_.channels();
    constexpr int kPaddingRows = 2;
    Bits in;
    int decode_pieces = 0;
    for (const bool decodes : {true, false}) {
      for (size_t s = 0; s < rows.size(); ++s) {
        if (rows[s] == 0 || (decode && rows[s] == 1) != decodes) continue;
        AddPiece(s, rows[s], decodes, in, pieces, tiles);
        order.push_back(s);
      }
      const auto row = static_cast<int32_t>(in.size() / channels);
      pieces.push_back({.row_begin = row, .slot = static_cast<int32_t>(rows.size())});
      if (decodes) {
        in.insert(in.end(), channels, kPoison);
        decode_pieces = static_cast<int>(pieces.size());
      }
    }
    tiles.push_back({.piece = static_cast<int32_t>(pieces.size()) - 1});
    in.insert(in.end(), kPaddingRows * channels, kPoison);

    const DeviceArray<uint16_t> device_in(in);
    const DeviceArray<uint16_t> device_weight(weight_);
    const DeviceArray<uint16_t> out = Poisoned(in.size());
    const DeviceArray<DevicePiece> device_pieces(pieces);
    const DeviceArray<DeviceTile> device_tiles(tiles);
    const GdnConvParams params = {.in = device_in.bf16(),
                                  .weight = device_weight.bf16(),
                                  .out = out.bf16(),
                                  .tail = tails_.data(),
                                  .slot_stride = 2 * tail_width_,
                                  .in_stride = channels,
                                  .out_stride = channels,
                                  .key_heads = shape_.key_heads,
                                  .key_dim = shape_.key_dim,
                                  .value_width = shape_.value_width,
                                  .casts = casts_,
                                  .batch = {.pieces = device_pieces.data(),
                                            .tiles = device_tiles.data(),
                                            .rows = static_cast<int32_t>(in.size() / channels),
                                            .piece_count = static_cast<int32_t>(pieces.size()),
                                            .decode_pieces = decode_pieces,
                                            .tile_count = static_cast<int32_t>(tiles.size())}};
    ASSERT_TRUE(LaunchGdnConv(params, nullptr).ok());
    const Bits got = out.Host();
    Bits unwritten = got;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const auto begin = pieces[i].row_begin * channels;
      std::fill_n(unwritten.begin() + begin, pieces[i].row_count * channels, kPoison);
    }
    ExpectSameBits(unwritten, Bits(unwritten.size(), kPoison));
    size_t next = 0;
    for (const DevicePiece& piece : pieces) {
      if (piece.row_count == 0) continue;
      Sequence& sequence = sequences[order[next++]];
      const auto from = got.begin() + piece.row_begin * channels;
      sequence.out.insert(sequence.out.end(), from, from + piece.row_count * channels);
      sequence.position += piece.row_count;
    }
  }

  // Every slot's tail is its sequence's last rows by position, and nothing else was written.
  void ExpectTails() const {
    Bits want(tail_width_ * (sequences.size() + 1), kPoison);
    const int64_t channels = shape_.channels();
    for (size_t s = 0; s < sequences.size(); ++s) {
      for (int p = std::max(0, sequences[s].position - 3); p < sequences[s].position; ++p) {
        std::copy_n(sequences[s].in.begin() + p * channels, channels,
                    want.begin() + static_cast<int64_t>(s) * tail_width_ + p % 3 * channels);
      }
    }
    ExpectSameBits(tails_.Host(), want);
  }

  const Bits& weight() const { return weight_; }

  std::vector<Sequence> sequences;

 private:
  void AddPiece(size_t s, int rows, bool decodes, Bits& in, std::vector<DevicePiece>& pieces,
                std::vector<DeviceTile>& tiles) const {
    const int64_t channels = shape_.channels();
    const Sequence& sequence = sequences[s];
    const auto row = static_cast<int32_t>(in.size() / channels);
    for (int done = 0; done < rows && !decodes;) {
      const int count = std::min(rows - done, 64 - (sequence.position + done) % 64);
      tiles.push_back({.piece = static_cast<int32_t>(pieces.size()),
                       .row_begin = row + done,
                       .row_count = count,
                       .position = sequence.position + done});
      done += count;
    }
    pieces.push_back(
        {.row_begin = row, .row_count = rows, .position = sequence.position, .slot = static_cast<int32_t>(s)});
    const auto from = sequence.in.begin() + sequence.position * channels;
    in.insert(in.end(), from, from + rows * channels);
  }

  ConvShape shape_;
  ConvCasts casts_;
  Bits weight_;
  int64_t tail_width_;
  DeviceArray<uint16_t> tails_;
};

// The sums, rounded to bf16 (kTwo): what silu and the l2norm are taken of.
Bits ConvSums(const Bits& in, const Bits& weight, int64_t channels) {
  Bits sums(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    const int64_t channel = static_cast<int64_t>(i) % channels;
    float sum = 0.0f;
    for (int tap = 0; tap < kGdnConvWidth; ++tap) {
      const int64_t from = static_cast<int64_t>(i) - (kGdnConvWidth - 1 - tap) * channels;
      if (from >= 0) sum += Bf16ToF32(weight[channel * kGdnConvWidth + tap]) * Bf16ToF32(in[from]);
    }
    sums[i] = F32ToBf16(sum);
  }
  return sums;
}

// y / sqrt(sum of squares + eps) for the heads of q and k in a row's first columns; v as it is.
std::vector<double> NormaliseHeads(const std::vector<double>& y, const ConvShape& shape) {
  std::vector<double> normalised = y;
  for (size_t row = 0; row < y.size(); row += shape.channels()) {
    for (int64_t head = 0; head < 2 * shape.key_heads; ++head) {
      const size_t begin = row + head * shape.key_dim;
      double squares = 1e-6;
      for (int64_t i = 0; i < shape.key_dim; ++i) squares += y[begin + i] * y[begin + i];
      for (int64_t i = 0; i < shape.key_dim; ++i) normalised[begin + i] /= std::sqrt(squares);
    }
  }
  return normalised;
}

const ConvShape kConvShapes[] = {{2, 96, 384}, {3, 32, 104}, {1, 64, 8}, {2, 128, 256}, {1, 192, 64}, {1, 256, 1032}};
const std::vector<int64_t> kConvLengths = {1, 2, 3, 4, 67, 150};

// v's columns are PyTorch's silu (its recorded bits) of the rounded sum, bit for bit. q's and k's: one more rounding.
TEST_F(CudaOps, ConvolutionIsTheSumSiluAndL2Norm) {
  const Bits silu = ReadArray<uint16_t>("unary_silu.bf16");
  ASSERT_EQ(silu.size(), 65536u);
  for (const ConvShape& shape : kConvShapes) {
    SCOPED_TRACE(shape.key_dim);
    ConvRun run(shape, kConvLengths, ConvCasts::kTwo);
    run.Step(std::vector<int>(kConvLengths.begin(), kConvLengths.end()), true);
    run.ExpectTails();
    for (const Sequence& sequence : run.sequences) {
      Bits activated = ConvSums(sequence.in, run.weight(), shape.channels());
      for (uint16_t& bits : activated) bits = silu[bits];
      Bits value_columns;
      Bits want_value_columns;
      std::vector<double> y;
      for (size_t i = 0; i < activated.size(); ++i) {
        y.push_back(Value(activated[i]));
        if (static_cast<int64_t>(i) % shape.channels() < shape.keys()) continue;
        value_columns.push_back(sequence.out[i]);
        want_value_columns.push_back(activated[i]);
      }
      ExpectSameBits(value_columns, want_value_columns);
      // In fp32 a sum of key_dim squares, a square root and a quotient of 2^-22 each, a product.
      ExpectNear(sequence.out, NormaliseHeads(y, shape), kBf16Rounding + 0x1p-16);
    }
  }
}

TEST_F(CudaOps, ConvolutionWithOneRounding) {
  const ConvShape shape = {2, 96, 384};
  ConvRun run(shape, {90}, ConvCasts::kOne);
  run.Step({90}, true);
  const Bits& in = run.sequences[0].in;
  std::vector<double> y(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    double sum = 0.0;
    for (int tap = 0; tap < kGdnConvWidth; ++tap) {
      const int64_t from = static_cast<int64_t>(i) - (kGdnConvWidth - 1 - tap) * shape.channels();
      const int64_t channel = static_cast<int64_t>(i) % shape.channels();
      if (from >= 0) sum += Value(run.weight()[channel * kGdnConvWidth + tap]) * Value(in[from]);
    }
    y[i] = sum / (1.0 + std::exp(-sum));
  }
  // silu rounds once, the norm once more; sums of four terms of size 1 are off by 2^-22 at most.
  ExpectNear(run.sequences[0].out, NormaliseHeads(y, shape), 2.1 * kBf16Rounding, 0x1p-20);
}

TEST_F(CudaOps, ConvolutionDoesNotDependOnThePieces) {
  const ConvShape shape = {2, 96, 384};
  const std::vector<int64_t> lengths = {5, 66, 200, 131, 1};
  ConvRun whole(shape, lengths, ConvCasts::kTwo);
  whole.Step(std::vector<int>(lengths.begin(), lengths.end()), false);
  std::mt19937 generator(7);
  for (int round = 0; round < 4; ++round) {
    ConvRun pieces(shape, lengths, ConvCasts::kTwo);
    for (bool done = false; !done;) {
      done = true;
      std::vector<int> rows;
      for (size_t s = 0; s < lengths.size(); ++s) {
        const int left = static_cast<int>(lengths[s]) - pieces.sequences[s].position;
        const int choices[] = {0, 1, 1, 2, 3, 16, 17, 64, 100};
        rows.push_back(std::min(left, choices[generator() % std::size(choices)]));
        done = done && rows.back() == left;
      }
      pieces.Step(rows, generator() % 2 == 0);
      pieces.ExpectTails();
    }
    for (size_t s = 0; s < lengths.size(); ++s) ExpectSameBits(pieces.sequences[s].out, whole.sequences[s].out);
  }
}

struct Gates {
  Bits beta;
  std::vector<float> g;
};

constexpr int64_t kHeads = 30;

// a and b are the two halves of one projection's rows.
Gates RunGates(const Bits& projection, const std::vector<float>& a_log, const std::vector<float>& dt_bias,
               bool neg_eigval) {
  const auto rows = static_cast<int64_t>(projection.size()) / (2 * kHeads);
  const DeviceArray<uint16_t> device_projection(projection);
  const DeviceArray<float> device_a_log(a_log);
  const DeviceArray<float> device_dt_bias(dt_bias);
  const DeviceArray<uint16_t> beta = Poisoned(rows * kHeads);
  const DeviceArray<float> g(std::vector<float>(rows * kHeads, NAN));
  const GdnGatesParams params = {.a = device_projection.bf16(),
                                 .b = device_projection.bf16() + kHeads,
                                 .a_log = device_a_log.data(),
                                 .dt_bias = device_dt_bias.data(),
                                 .beta = beta.bf16(),
                                 .g = g.data(),
                                 .rows = rows,
                                 .heads = kHeads,
                                 .a_stride = 2 * kHeads,
                                 .b_stride = 2 * kHeads,
                                 .beta_stride = kHeads,
                                 .g_stride = kHeads,
                                 .neg_eigval = neg_eigval};
  EXPECT_TRUE(LaunchGdnGates(params, nullptr).ok());
  return {beta.Host(), g.Host()};
}

TEST_F(CudaOps, GatesNearTheOracle) {
  constexpr int64_t kRows = 201;
  Bits projection = RandomBits(kRows * 2 * kHeads, 40, 6.0f);
  for (int64_t h = 0; h < kHeads; ++h) projection[h] = F32ToBf16(30.0f);  // past softplus's threshold
  std::vector<float> a_log(kHeads);
  std::vector<float> dt_bias(kHeads);
  for (int64_t h = 0; h < kHeads; ++h) {
    a_log[h] = 0.1f * static_cast<float>(h) - 1.0f;
    dt_bias[h] = 0.3f * static_cast<float>(h) - 4.0f;
  }
  const Gates gates = RunGates(projection, a_log, dt_bias, false);
  std::vector<double> beta;
  size_t outside = 0;
  for (int64_t i = 0; i < kRows * kHeads; ++i) {
    const int64_t head = i % kHeads;
    const int64_t column = i / kHeads * 2 * kHeads + head;
    beta.push_back(1.0 / (1.0 + std::exp(-Value(projection[column + kHeads]))));
    const float x = Bf16ToF32(projection[column]) + dt_bias[head];
    const double want = -std::exp(static_cast<double>(a_log[head])) * std::log1p(std::exp(static_cast<double>(x)));
    // Two exponentials, a logarithm and a product of 2 units of 2^-24 each; e^-x lost above the threshold is e^-20.
    outside += !(std::abs(gates.g[i] - want) <= std::abs(want) * 0x1p-20);
  }
  EXPECT_EQ(outside, 0u);
  ExpectNear(gates.beta, beta, kBf16Rounding + 0x1p-20);

  const Gates doubled = RunGates(projection, a_log, dt_bias, true);
  Bits twice;
  for (const uint16_t bits : gates.beta) twice.push_back(F32ToBf16(2.0f * Bf16ToF32(bits)));
  ExpectSameBits(doubled.beta, twice);
  EXPECT_EQ(doubled.g, gates.g);
}

// A step's rows: decode rows, padding of a recorded step (which has no prefill rows), then pieces of prefill.
struct StepRowsOf {
  int decode = 0;
  int padding = 0;
  std::vector<int> prefill{};

  int decode_pieces() const { return decode + padding; }
  int rows() const { return std::accumulate(prefill.begin(), prefill.end(), decode_pieces()); }
  int slots() const { return decode + static_cast<int>(prefill.size()); }
};

// What one layer's convolution and gates leave behind.
struct ConvAndGates {
  Bits out;
  Bits tails;
  Bits beta;
  std::vector<float> g;
};

// Both read one projection [q k v | a | b | other], and write rows wider than they are. `together`: in one launch.
ConvAndGates RunConvAndGates(const StepRowsOf& step, const ConvShape& shape, int64_t heads, ConvCasts casts,
                             bool neg_eigval, bool together) {
  std::vector<DevicePiece> pieces;
  std::vector<DeviceTile> tiles;
  for (int i = 0; i < step.decode; ++i) {
    pieces.push_back({.row_begin = i, .row_count = 1, .position = 2 * i, .slot = i});
  }
  pieces.resize(step.decode_pieces());
  int row = step.decode_pieces();
  for (const int rows : step.prefill) {
    const auto piece = static_cast<int32_t>(pieces.size());
    const int position = 5 * (piece - step.decode_pieces());
    pieces.push_back({.row_begin = row, .row_count = rows, .position = position, .slot = piece - step.padding});
    for (int done = 0; done < rows;) {
      const int count = std::min(rows - done, 64 - (position + done) % 64);
      tiles.push_back({.piece = piece, .row_begin = row + done, .row_count = count, .position = position + done});
      done += count;
    }
    row += rows;
  }
  const int64_t channels = shape.channels();
  const int64_t in_stride = channels + 2 * heads + (8 - 2 * heads % 8);
  const int64_t out_stride = channels + 8;
  const int64_t tail_width = 3 * channels + 8;
  const DeviceArray<uint16_t> projection(RandomBits(row * in_stride, 41, 2.0f));
  const DeviceArray<uint16_t> weight(RandomBits(channels * kGdnConvWidth, 42, 0.4f));
  const DeviceArray<float> a_log(RandomFloats(heads, 43));
  const DeviceArray<float> dt_bias(RandomFloats(heads, 44));
  const DeviceArray<uint16_t> tails(RandomBits(step.slots() * tail_width, 45));
  const DeviceArray<uint16_t> out = Poisoned(row * out_stride);
  const DeviceArray<uint16_t> beta = Poisoned(row * (heads + 1));
  const DeviceArray<float> g(PoisonFloats(row * (heads + 3)));
  const DeviceArray<DevicePiece> device_pieces(pieces);
  const DeviceArray<DeviceTile> device_tiles(tiles);
  const GdnConvParams conv = {.in = projection.bf16(),
                              .weight = weight.bf16(),
                              .out = out.bf16(),
                              .tail = tails.data(),
                              .slot_stride = 2 * tail_width,
                              .in_stride = in_stride,
                              .out_stride = out_stride,
                              .key_heads = shape.key_heads,
                              .key_dim = shape.key_dim,
                              .value_width = shape.value_width,
                              .casts = casts,
                              .batch = {.pieces = device_pieces.data(),
                                        .tiles = device_tiles.data(),
                                        .rows = row,
                                        .piece_count = static_cast<int32_t>(pieces.size()),
                                        .decode_pieces = step.decode_pieces(),
                                        .tile_count = static_cast<int32_t>(tiles.size())}};
  const GdnGatesParams gates = {.a = projection.bf16() + channels,
                                .b = projection.bf16() + channels + heads,
                                .a_log = a_log.data(),
                                .dt_bias = dt_bias.data(),
                                .beta = beta.bf16(),
                                .g = g.data(),
                                .rows = row,
                                .heads = heads,
                                .a_stride = in_stride,
                                .b_stride = in_stride,
                                .beta_stride = heads + 1,
                                .g_stride = heads + 3,
                                .neg_eigval = neg_eigval};
  if (together) {
    EXPECT_TRUE(LaunchGdnConvAndGates(conv, gates, nullptr).ok());
  } else {
    EXPECT_TRUE(LaunchGdnConv(conv, nullptr).ok());
    EXPECT_TRUE(LaunchGdnGates(gates, nullptr).ok());
  }
  return {out.Host(), tails.Host(), beta.Host(), g.Host()};
}

// Decode alone, with a recorded step's padding, prefill in short and in long runs, and both side by side. What neither
// kernel writes is poison on both sides.
TEST_F(CudaOps, ConvolutionAndGatesInOneLaunchEqualTheTwo) {
  const StepRowsOf steps[] = {{.decode = 1},
                              {.decode = 2},
                              {.decode = 5, .padding = 3},
                              {.decode = 128, .padding = 32},
                              {.prefill = {1}},
                              {.prefill = {37, 100}},
                              {.prefill = {1100}},
                              {.decode = 3, .prefill = {1, 70}},
                              {.decode = 33, .prefill = {1025, 64}}};
  const std::pair<ConvShape, int64_t> layers[] = {{{2, 96, 384}, 2}, {{3, 32, 104}, 7}, {{1, 256, 1032}, kHeads}};
  for (const StepRowsOf& step : steps) {
    SCOPED_TRACE(step.rows());
    for (const auto& [shape, heads] : layers) {
      SCOPED_TRACE(heads);
      const ConvCasts casts = heads == 7 ? ConvCasts::kOne : ConvCasts::kTwo;
      const bool neg_eigval = heads != 2;
      const ConvAndGates apart = RunConvAndGates(step, shape, heads, casts, neg_eigval, false);
      const ConvAndGates together = RunConvAndGates(step, shape, heads, casts, neg_eigval, true);
      ExpectSameBits(together.out, apart.out);
      ExpectSameBits(together.tails, apart.tails);
      ExpectSameBits(together.beta, apart.beta);
      ExpectSameBits(together.g, apart.g);
      // Every gate was written, nothing beside them.
      for (int64_t i = 0; i < static_cast<int64_t>(together.beta.size()); ++i) {
        ASSERT_EQ(together.beta[i] == kPoison, i % (heads + 1) == heads) << i;
      }
    }
  }
}

// A batch of padding alone has gates all the same.
TEST_F(CudaOps, GatesOfPaddingRows) {
  const ConvShape shape = {2, 96, 384};
  const ConvAndGates got = RunConvAndGates({.padding = 4}, shape, kHeads, ConvCasts::kTwo, true, true);
  const ConvAndGates want = RunConvAndGates({.padding = 4}, shape, kHeads, ConvCasts::kTwo, true, false);
  ExpectSameBits(got.out, Bits(got.out.size(), kPoison));
  ExpectSameBits(got.beta, want.beta);
  ExpectSameBits(got.g, want.g);
}

// x in rows of their own, gate as the last columns of wider rows.
Bits RunGatedNorm(const Bits& x, const Bits& gate, const Bits& weight, int64_t heads, GatedNormCasts casts,
                  bool in_place) {
  const auto head_dim = static_cast<int64_t>(weight.size());
  const int64_t width = heads * head_dim;
  const auto rows = static_cast<int64_t>(x.size()) / width;
  constexpr int64_t kOther = 16;
  Bits projection;
  for (int64_t r = 0; r < rows; ++r) {
    projection.insert(projection.end(), kOther, kPoison);
    projection.insert(projection.end(), gate.begin() + r * width, gate.begin() + (r + 1) * width);
  }
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_gate(projection);
  const DeviceArray<uint16_t> device_weight(weight);
  const DeviceArray<uint16_t> separate = Poisoned(x.size());
  const DeviceArray<uint16_t>& out = in_place ? device_x : separate;
  const GatedRmsNormParams params = {.x = device_x.bf16(),
                                     .gate = device_gate.bf16() + kOther,
                                     .weight = device_weight.bf16(),
                                     .out = out.bf16(),
                                     .rows = rows,
                                     .heads = heads,
                                     .head_dim = head_dim,
                                     .x_stride = width,
                                     .gate_stride = kOther + width,
                                     .out_stride = width,
                                     .eps = 1e-5f,
                                     .casts = casts};
  EXPECT_TRUE(LaunchGatedRmsNorm(params, nullptr).ok());
  return out.Host();
}

TEST_F(CudaOps, GatedNormNearTheOracle) {
  for (const int64_t head_dim : {128, 192, 256}) {
    SCOPED_TRACE(head_dim);
    constexpr int64_t kGatedHeads = 3;
    const Bits x = RandomBits(21 * kGatedHeads * head_dim, 50, 2.0f);
    Bits gate = RandomBits(x.size(), 51, 3.0f);
    const float extremes[] = {-100.0f, -87.5f, -81.0f, -80.0f, 80.0f, 81.0f, 200.0f};
    for (size_t i = 0; i < std::size(extremes); ++i) gate[17 * i] = F32ToBf16(extremes[i]);
    const Bits weight = RandomBits(head_dim, 52);
    std::vector<double> want(x.size());
    for (size_t begin = 0; begin < x.size(); begin += head_dim) {
      double squares = 0.0;
      for (int64_t i = 0; i < head_dim; ++i) squares += Value(x[begin + i]) * Value(x[begin + i]);
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(head_dim) + 1e-5);
      for (int64_t i = 0; i < head_dim; ++i) {
        const double z = Value(gate[begin + i]);
        want[begin + i] = Value(x[begin + i]) * inverse * Value(weight[i]) * z / (1.0 + std::exp(-z));
      }
    }
    for (const GatedNormCasts casts : {GatedNormCasts::kThree, GatedNormCasts::kOne}) {
      const Bits got = RunGatedNorm(x, gate, weight, kGatedHeads, casts, false);
      ExpectNear(got, want, (casts == GatedNormCasts::kThree ? 3.1 : 1.0) * kBf16Rounding + 0x1p-16,
                 0x1p-110);  // e^-gate overflows fp32 below -88
      ExpectSameBits(RunGatedNorm(x, gate, weight, kGatedHeads, casts, true), got);
      const int64_t width = kGatedHeads * head_dim;
      const Bits row =
          RunGatedNorm(Bits(x.begin() + width, x.begin() + 2 * width),
                       Bits(gate.begin() + width, gate.begin() + 2 * width), weight, kGatedHeads, casts, false);
      ExpectSameBits(row, Bits(got.begin() + width, got.begin() + 2 * width));
    }
  }
}

TEST_F(CudaOps, AddRoundsTheSum) {
  constexpr int64_t kRows = 33;
  constexpr int64_t kWidth = 72;
  constexpr int64_t kStride = 80;
  const Bits x = RandomBits(kRows * kWidth, 60);
  Bits residual = RandomBits(kRows * kStride, 61);
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_residual(residual);
  const AddParams params = {.x = device_x.bf16(),
                            .residual = device_residual.bf16(),
                            .rows = kRows,
                            .width = kWidth,
                            .x_stride = kWidth,
                            .residual_stride = kStride};
  ASSERT_TRUE(LaunchAdd(params, nullptr).ok());
  for (int64_t i = 0; i < kRows * kWidth; ++i) {
    uint16_t& sum = residual[i / kWidth * kStride + i % kWidth];
    sum = F32ToBf16(Bf16ToF32(sum) + Bf16ToF32(x[i]));
  }
  ExpectSameBits(device_residual.Host(), residual);
}

TEST_F(CudaOps, GatherRowsCopies) {
  constexpr int64_t kWidth = 1032;
  const Bits in = RandomBits(10 * kWidth, 62);
  const std::vector<int32_t> indices = {9, 0, 4, 4};
  Bits want;
  for (const int32_t i : indices) want.insert(want.end(), in.begin() + i * kWidth, in.begin() + (i + 1) * kWidth);
  const DeviceArray<uint16_t> device_in(in);
  const DeviceArray<int32_t> device_indices(indices);
  const DeviceArray<uint16_t> out = Poisoned(want.size());
  const GatherRowsParams params = {.indices = device_indices.data(),
                                   .in = device_in.bf16(),
                                   .out = out.bf16(),
                                   .rows = static_cast<int64_t>(indices.size()),
                                   .in_rows = 10,
                                   .width = kWidth,
                                   .in_stride = kWidth,
                                   .out_stride = kWidth};
  ASSERT_TRUE(LaunchGatherRows(params, nullptr).ok());
  ExpectSameBits(out.Host(), want);
}

// From here on no GPU is needed.
TEST(CudaParams, GdnConvNamesTheBadField) {
  using P = GdnConvParams;
  static const DevicePiece piece;
  static const DeviceTile tile;
  const P good = {
      .in = Address(),
      .weight = Address(),
      .out = Address(),
      .tail = Address(),
      .slot_stride = 3 * 2 * 768,
      .in_stride = 768,
      .out_stride = 768,
      .key_heads = 2,
      .key_dim = 96,
      .value_width = 384,
      .batch = {.pieces = &piece, .tiles = &tile, .rows = 1, .piece_count = 2, .decode_pieces = 1, .tile_count = 1}};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".key_dim", [](P& p) { p.key_dim = 80; });
  ExpectRefusedAfter(good, ".key_heads", [](P& p) { p.key_heads = 0; });
  ExpectRefusedAfter(good, ".value_width", [](P& p) { p.value_width = 380; });
  ExpectRefusedAfter(good, ".in:", [](P& p) { p.in = Address(4104); });
  ExpectRefusedAfter(good, ".weight:", [](P& p) { p.weight = nullptr; });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefusedAfter(good, ".tail:", [](P& p) { p.tail = nullptr; });
  ExpectRefusedAfter(good, ".in_stride", [](P& p) { p.in_stride = 767; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 760; });
  ExpectRefusedAfter(good, ".slot_stride", [](P& p) { p.slot_stride = 3 * 2 * 760; });
  ExpectRefusedAfter(good, ".slot_stride", [](P& p) { p.slot_stride = 3 * 2 * 768 + 8; });
  ExpectRefusedAfter(good, ".decode_pieces", [](P& p) { p.batch.decode_pieces = 3; });
  ExpectRefusedAfter(good, ".tile_count", [](P& p) { p.batch.tile_count = -1; });
  ExpectRefusedAfter(good, ".tile_count", [](P& p) { p.batch.decode_pieces = 2; });
  ExpectRefusedAfter(good, ".pieces", [](P& p) { p.batch.pieces = nullptr; });
  ExpectRefusedAfter(good, ".tiles", [](P& p) { p.batch.tiles = nullptr; });
}

TEST(CudaParams, GdnGatesNamesTheBadField) {
  using P = GdnGatesParams;
  static float word = 0;
  const P good = {.a = Address(),
                  .b = Address(),
                  .a_log = &word,
                  .dt_bias = &word,
                  .beta = Address(),
                  .g = &word,
                  .rows = 2,
                  .heads = 30,
                  .a_stride = 60,
                  .b_stride = 60,
                  .beta_stride = 30,
                  .g_stride = 30};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = -1; });
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = INT32_MAX; });
  ExpectRefusedAfter(good, ".heads", [](P& p) { p.heads = 0; });
  ExpectRefusedAfter(good, ".a:", [](P& p) { p.a = nullptr; });
  ExpectRefusedAfter(good, ".b:", [](P& p) { p.b = Address(4097); });
  ExpectRefusedAfter(good, ".a_log", [](P& p) { p.a_log = nullptr; });
  ExpectRefusedAfter(good, ".dt_bias", [](P& p) { p.dt_bias = nullptr; });
  ExpectRefusedAfter(good, ".beta:", [](P& p) { p.beta = nullptr; });
  ExpectRefusedAfter(good, ".g:", [](P& p) { p.g = nullptr; });
  ExpectRefusedAfter(good, ".a_stride", [](P& p) { p.a_stride = 29; });
  ExpectRefusedAfter(good, ".b_stride", [](P& p) { p.b_stride = 29; });
  ExpectRefusedAfter(good, ".beta_stride", [](P& p) { p.beta_stride = 29; });
  ExpectRefusedAfter(good, ".g_stride", [](P& p) { p.g_stride = 29; });
}

TEST(CudaParams, ConvolutionAndGatesAreBothChecked) {
  const absl::Status gates = LaunchGdnConvAndGates({}, {}, nullptr);
  EXPECT_THAT(std::string(gates.message()), ::testing::HasSubstr("GdnGatesParams.heads"));
  static float word = 0;
  const absl::Status conv = LaunchGdnConvAndGates({},
                                                  {.a = Address(),
                                                   .b = Address(),
                                                   .a_log = &word,
                                                   .dt_bias = &word,
                                                   .beta = Address(),
                                                   .g = &word,
                                                   .rows = 1,
                                                   .heads = 1,
                                                   .a_stride = 1,
                                                   .b_stride = 1,
                                                   .beta_stride = 1,
                                                   .g_stride = 1},
                                                  nullptr);
  EXPECT_THAT(std::string(conv.message()), ::testing::HasSubstr("GdnConvParams.key_dim"));
}

TEST(CudaParams, GatedRmsNormNamesTheBadField) {
  using P = GatedRmsNormParams;
  const P good = {.x = Address(),
                  .gate = Address(),
                  .weight = Address(),
                  .out = Address(),
                  .rows = 2,
                  .heads = 2,
                  .head_dim = 192,
                  .x_stride = 384,
                  .gate_stride = 1000,
                  .out_stride = 384,
                  .eps = 1e-5f};
  ASSERT_TRUE(good.Validate().ok());
  ExpectRefusedAfter(good, ".rows", [](P& p) { p.rows = -1; });
  ExpectRefusedAfter(good, ".heads", [](P& p) { p.heads = 0; });
  ExpectRefusedAfter(good, ".head_dim", [](P& p) { p.head_dim = 96; });
  ExpectRefusedAfter(good, ".eps", [](P& p) { p.eps = INFINITY; });
  ExpectRefusedAfter(good, ".x:", [](P& p) { p.x = nullptr; });
  ExpectRefusedAfter(good, ".gate:", [](P& p) { p.gate = Address(4104); });
  ExpectRefusedAfter(good, ".weight:", [](P& p) { p.weight = nullptr; });
  ExpectRefusedAfter(good, ".out:", [](P& p) { p.out = nullptr; });
  ExpectRefusedAfter(good, ".x_stride", [](P& p) { p.x_stride = 376; });
  ExpectRefusedAfter(good, ".gate_stride", [](P& p) { p.gate_stride = 390; });
  ExpectRefusedAfter(good, ".out_stride", [](P& p) { p.out_stride = 0; });
}

TEST(CudaParams, RowOperationsNameTheBadField) {
  const AddParams add = {
      .x = Address(), .residual = Address(), .rows = 2, .width = 64, .x_stride = 64, .residual_stride = 64};
  ASSERT_TRUE(add.Validate().ok());
  ExpectRefusedAfter(add, ".rows", [](AddParams& p) { p.rows = -1; });
  ExpectRefusedAfter(add, ".width", [](AddParams& p) { p.width = 60; });
  ExpectRefusedAfter(add, ".x:", [](AddParams& p) { p.x = nullptr; });
  ExpectRefusedAfter(add, ".residual:", [](AddParams& p) { p.residual = Address(4100); });
  ExpectRefusedAfter(add, ".x_stride", [](AddParams& p) { p.x_stride = 56; });
  ExpectRefusedAfter(add, ".residual_stride", [](AddParams& p) { p.residual_stride = 65; });

  static int32_t word = 0;
  const GatherRowsParams gather = {.indices = &word,
                                   .in = Address(),
                                   .out = Address(),
                                   .rows = 2,
                                   .in_rows = 9,
                                   .width = 64,
                                   .in_stride = 64,
                                   .out_stride = 64};
  ASSERT_TRUE(gather.Validate().ok());
  ExpectRefusedAfter(gather, ".rows", [](GatherRowsParams& p) { p.rows = -1; });
  ExpectRefusedAfter(gather, ".in_rows", [](GatherRowsParams& p) { p.in_rows = 0; });
  ExpectRefusedAfter(gather, ".width", [](GatherRowsParams& p) { p.width = 60; });
  ExpectRefusedAfter(gather, ".indices", [](GatherRowsParams& p) { p.indices = nullptr; });
  ExpectRefusedAfter(gather, ".in:", [](GatherRowsParams& p) { p.in = nullptr; });
  ExpectRefusedAfter(gather, ".out:", [](GatherRowsParams& p) { p.out = nullptr; });
  ExpectRefusedAfter(gather, ".in_stride", [](GatherRowsParams& p) { p.in_stride = 63; });
  ExpectRefusedAfter(gather, ".out_stride", [](GatherRowsParams& p) { p.out_stride = 63; });
}

}  // namespace
}  // namespace lockstep::cuda

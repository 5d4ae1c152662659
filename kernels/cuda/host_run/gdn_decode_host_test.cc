// GDN decode's own source on a CPU, against the oracle's chunk program (a GPU's bits): sequences decoded row by row
// from a slot of NaNs, so that all a row finds of the earlier ones is what the kernel has left.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/host_run/poisoned_memory.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/gdn_chunk.h"
#include "kernels/oracle/row_ops.h"

namespace lockstep::cuda {
namespace {

using host_run::Allocate;
using host_run::Memory;

constexpr uint16_t kPoison = 0xFFFF;
constexpr int kConvWidth = 4;
constexpr int kKeyHeads = 1;
constexpr int kValueHeads = 2;
constexpr int kChannels = GdnConvChannels(kKeyHeads, kValueHeads);
constexpr int kWidth = kValueHeads * kGdnValueDim;  // of a row of the output
constexpr int64_t kStateFloats = kGdnStateF32Bytes / 4;
constexpr float kEps = 1e-5f;

using Bits = std::vector<uint16_t>;

const __nv_bfloat16* Bf16(const void* memory) {
  return static_cast<const __nv_bfloat16*>(memory);
}

template <class T>
Memory CopyOf(const std::vector<T>& values) {
  Memory memory = Allocate(values.size() * sizeof(T));
  std::memcpy(memory.get(), values.data(), values.size() * sizeof(T));
  return memory;
}

// Rows of one sequence: q | k | v with q and k of length 1, and the output norm's gates.
struct Sequence {
  Sequence(int rows, uint32_t seed);

  oracle::GdnRow Row(int row, int head) const {
    const uint16_t* q = &qkv[row * kChannels];
    return {.q = q,
            .k = q + kGdnKeyDim,
            .v = q + 2 * kGdnKeyDim + head * kGdnValueDim,
            .g = g[row * kValueHeads + head],
            .beta = beta[row * kValueHeads + head]};
  }

  int rows;
  Bits qkv;              // [rows, kChannels]
  Bits beta;             // [rows, kValueHeads], in (0, 2)
  std::vector<float> g;  // [rows, kValueHeads], below 0
  Bits gate;             // [rows, kWidth]
};

Sequence::Sequence(int row_count, uint32_t seed) : rows(row_count) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(0.02f, 1.98f);
  for (int row = 0; row < rows; ++row) {
    for (int vector = 0; vector < 2 * kKeyHeads; ++vector) {
      std::vector<float> x(kGdnKeyDim);
      float squares = 0.0f;
      for (float& value : x) {
        value = normal(random);
        squares += value * value;
      }
      for (const float value : x) qkv.push_back(F32ToBf16(value / std::sqrt(squares)));
    }
    for (int i = 0; i < kWidth; ++i) {
      qkv.push_back(F32ToBf16(normal(random)));
      gate.push_back(F32ToBf16(3.0f * normal(random)));
    }
    for (int head = 0; head < kValueHeads; ++head) {
      beta.push_back(F32ToBf16(uniform(random)));
      g.push_back(-0.2f * uniform(random) * uniform(random));
    }
  }
  // Beside silu's fast range, and what has no silu.
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  size_t at = 5;
  for (const float beside : {-100.0f, -87.5f, -81.0f, -80.0f, 80.0f, 81.0f, 200.0f, kInfinity, -kInfinity}) {
    if (at < gate.size()) gate[at] = F32ToBf16(beside);
    at += 3 * kGdnValueDim + 17;
  }
}

// What a chunk's last row leaves of one head.
struct ChunkEnd {
  std::vector<float> state;    // S [96, 192]
  std::vector<float> inverse;  // T in fp32, each row up to the diagonal
};

// The oracle's rows of a sequence, and what its whole chunks leave.
struct Oracle {
  explicit Oracle(const Sequence& sequence)
      : o(sequence.rows * kWidth), ends(sequence.rows / kGdnChunk, std::vector<ChunkEnd>(kValueHeads)) {
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kGdnKeyDim)));
    for (int head = 0; head < kValueHeads; ++head) {
      std::vector<float> state(kStateFloats);
      for (int begin = 0; begin < sequence.rows; begin += kGdnChunk) {
        oracle::GdnChunk chunk({.key_dim = kGdnKeyDim, .value_dim = kGdnValueDim}, state.data(), scale);
        for (int row = begin; row < std::min(sequence.rows, begin + kGdnChunk); ++row) {
          chunk.Append(sequence.Row(row, head));
          std::copy_n(&chunk.o[(row - begin) * kGdnValueDim], kGdnValueDim, &o[row * kWidth + head * kGdnValueDim]);
        }
        if (chunk.rows() < kGdnChunk) continue;
        state = chunk.NextState();
        ChunkEnd& end = ends[begin / kGdnChunk][head];
        end.state = state;
        for (int i = 0; i < kGdnChunk; ++i) {
          end.inverse.insert(end.inverse.end(), &chunk.inverse[i * kGdnChunk], &chunk.inverse[i * kGdnChunk] + i + 1);
        }
      }
    }
  }

  Bits Row(int row) const { return {o.begin() + row * kWidth, o.begin() + (row + 1) * kWidth}; }

  Bits o;                                   // [rows, kWidth]
  std::vector<std::vector<ChunkEnd>> ends;  // [whole chunks][kValueHeads]
};

// The output norm's weights, as each cast takes them.
struct NormWeight {
  NormWeight() : bf16(kGdnValueDim), fp32(kGdnValueDim) {
    std::mt19937 random(90);
    std::normal_distribution<float> normal(1.0f, 0.3f);
    for (float& weight : fp32) weight = normal(random);
    for (uint16_t& weight : bf16) weight = F32ToBf16(normal(random));
  }
  Memory For(GatedNormCasts casts) const { return casts == GatedNormCasts::kTwo ? CopyOf(fp32) : CopyOf(bf16); }

  Bits bf16;
  std::vector<float> fp32;
};

// The gated norm of a finished row, by its own kernel.
Bits NormOf(const Bits& row, const Bits& gate, GatedNormCasts casts) {
  const Memory x = CopyOf(row), gates = CopyOf(gate), weight = NormWeight().For(casts), out = Allocate(2 * kWidth);
  const absl::Status status = LaunchGatedRmsNorm({.x = Bf16(x.get()),
                                                  .gate = Bf16(gates.get()),
                                                  .weight = weight.get(),
                                                  .out = reinterpret_cast<__nv_bfloat16*>(out.get()),
                                                  .rows = 1,
                                                  .heads = kValueHeads,
                                                  .head_dim = kGdnValueDim,
                                                  .x_stride = kWidth,
                                                  .gate_stride = kWidth,
                                                  .out_stride = kWidth,
                                                  .eps = kEps,
                                                  .casts = casts},
                                                 nullptr);
  EXPECT_TRUE(status.ok()) << status;
  Bits result(kWidth);
  std::memcpy(result.data(), out.get(), 2 * kWidth);
  return result;
}

// A row to decode.
struct Work {
  const Sequence* sequence;
  int position;
  int slot;
};

// One layer's slots, all NaN at first. Slot 0 is what padding names, and stays so.
class Layer {
 public:
  explicit Layer(int slots)
      : layout_(MakeGdnStateLayout(kKeyHeads, kValueHeads, kConvWidth)),
        bytes_(slots * layout_.bytes),
        state_(Allocate(bytes_)) {}

  // The output row of each piece of work, which has padding before and behind it. With `norm` normalised.
  std::vector<Bits> Decode(const std::vector<Work>& work, std::optional<GatedNormCasts> norm = std::nullopt) {
    const int rows = static_cast<int>(work.size()) + 2;
    std::vector<DevicePiece> pieces(rows);
    Bits qkv(rows * kChannels, kPoison), beta(rows * kValueHeads, kPoison);
    std::vector<float> g(rows * kValueHeads, NAN);
    // Rows of the output, and of the gates, are wider than they are used.
    constexpr int kOutStride = kWidth + 8, kGateStride = kWidth + 24;
    Bits gate(rows * kGateStride, kPoison);
    for (int i = 1; i <= static_cast<int>(work.size()); ++i) {
      const auto& [sequence, position, slot] = work[i - 1];
      pieces[i] = {.row_begin = i, .row_count = 1, .position = position, .slot = slot};
      std::copy_n(&sequence->qkv[position * kChannels], kChannels, &qkv[i * kChannels]);
      std::copy_n(&sequence->beta[position * kValueHeads], kValueHeads, &beta[i * kValueHeads]);
      std::copy_n(&sequence->g[position * kValueHeads], kValueHeads, &g[i * kValueHeads]);
      std::copy_n(&sequence->gate[position * kWidth], kWidth, &gate[i * kGateStride]);
    }
    const Memory device_qkv = CopyOf(qkv), device_beta = CopyOf(beta), device_g = CopyOf(g), device_gate = CopyOf(gate);
    const Memory weight = NormWeight().For(norm.value_or(GatedNormCasts::kThree));
    const Memory out = Allocate(2 * rows * kOutStride);
    const GdnParams params = {
        .q = Bf16(device_qkv.get()),
        .k = Bf16(device_qkv.get()) + kKeyHeads * kGdnKeyDim,
        .v = Bf16(device_qkv.get()) + 2 * kKeyHeads * kGdnKeyDim,
        .beta = Bf16(device_beta.get()),
        .g = reinterpret_cast<const float*>(device_g.get()),
        .out = reinterpret_cast<__nv_bfloat16*>(out.get()),
        .q_stride = kChannels,
        .k_stride = kChannels,
        .v_stride = kChannels,
        .beta_stride = kValueHeads,
        .g_stride = kValueHeads,
        .out_stride = kOutStride,
        .key_heads = kKeyHeads,
        .value_heads = kValueHeads,
        .state = reinterpret_cast<char*>(state_.get()),
        .slot_stride = layout_.bytes,
        .layout = layout_,
        .batch = {.pieces = pieces.data(), .rows = rows, .piece_count = rows, .decode_pieces = rows}};
    const GdnOutputNorm output_norm = {.gate = Bf16(device_gate.get()),
                                       .weight = weight.get(),
                                       .gate_stride = kGateStride,
                                       .eps = kEps,
                                       .casts = norm.value_or(GatedNormCasts::kThree)};
    const absl::Status status =
        norm.has_value() ? LaunchGdnDecodeNorm(params, output_norm, nullptr) : LaunchGdnDecode(params, nullptr);
    EXPECT_TRUE(status.ok()) << status;
    Bits wide(rows * kOutStride);
    std::memcpy(wide.data(), out.get(), 2 * wide.size());
    std::vector<Bits> results;
    int untouched = rows * kOutStride - static_cast<int>(work.size()) * kWidth;
    for (int i = 0; i < rows; ++i) {
      const auto row = wide.begin() + i * kOutStride;
      const bool padding = i == 0 || i == rows - 1;
      if (!padding) results.emplace_back(row, row + kWidth);
      untouched -= static_cast<int>(std::count(padding ? row : row + kWidth, row + kOutStride, kPoison));
    }
    EXPECT_EQ(untouched, 0) << "padding was written";
    EXPECT_EQ(std::count(state_.get(), state_.get() + layout_.bytes, std::byte{0xFF}), layout_.bytes)
        << "padding's slot was written";
    return results;
  }

  // What the slot has of a head after a chunk's last row: S, and T from the blocks that gdn_math.cuh describes.
  ChunkEnd End(int slot, int head) const {
    ChunkEnd end;
    const int64_t state = slot * layout_.bytes + layout_.state_f32 + head * kGdnStateF32Bytes;
    for (int dk = 0; dk < kGdnKeyDim; ++dk) {
      for (int dv = 0; dv < kGdnValueDim; ++dv) end.state.push_back(Float(state + 4 * GdnStateElement(dk, dv)));
    }
    const int64_t solve = slot * layout_.bytes + layout_.solve + head * kGdnSolveBytes;
    for (int i = 0; i < kGdnChunk; ++i) {
      for (int j = 0; j <= i; ++j) {
        const int r = i / 16, c = j / 16, row = i % 16, column = j % 16;
        const int block = r * (r + 1) / 2 + (c == r ? 0 : 1 + c);
        end.inverse.push_back(Float(solve + 4 * (block * 256 + row * 16 + (column ^ (row & 2) << 2))));
      }
    }
    return end;
  }

 private:
  float Float(int64_t offset) const {
    float value;
    std::memcpy(&value, state_.get() + offset, sizeof(value));
    return value;
  }

  GdnStateLayout layout_;
  int64_t bytes_;
  Memory state_;
};

int Differing(const std::vector<float>& got, const std::vector<float>& want) {
  int count = 0;
  for (size_t i = 0; i < want.size(); ++i) count += std::bit_cast<uint32_t>(got[i]) != std::bit_cast<uint32_t>(want[i]);
  return count;
}

// After a chunk's last row: what rows of bf16 hardly show, S and T in all their bits.
void ExpectEnd(const Layer& layer, int slot, const std::vector<ChunkEnd>& want) {
  for (int head = 0; head < kValueHeads; ++head) {
    const ChunkEnd end = layer.End(slot, head);
    EXPECT_EQ(Differing(end.state, want[head].state), 0) << "head " << head;
    EXPECT_EQ(Differing(end.inverse, want[head].inverse), 0) << "head " << head;
  }
}

// Two whole chunks and the first rows of a third: a chunk from S = 0, one from the S that the kernel has left, whose
// end takes S in fp32 too, and rows from that one's. At the end a second sequence joins.
TEST(GdnDecodeOnACpu, EveryRowHasTheGpusBits) {
  constexpr int kRows = 2 * kGdnChunk + 2, kJoins = kRows - 3;
  const Sequence long_one(kRows, 1), short_one(kRows - kJoins, 2);
  const Oracle long_oracle(long_one), short_oracle(short_one);
  Layer layer(3);
  for (int row = 0; row < kRows; ++row) {
    SCOPED_TRACE(testing::Message() << "row " << row);
    std::vector<Work> work = {{&long_one, row, 2}};
    if (row >= kJoins) work.push_back({&short_one, row - kJoins, 1});
    const std::vector<Bits> out = layer.Decode(work);
    ASSERT_EQ(out[0], long_oracle.Row(row));
    if (row % kGdnChunk == kGdnChunk - 1) ExpectEnd(layer, 2, long_oracle.ends[row / kGdnChunk]);
    if (row < kJoins) continue;
    ASSERT_EQ(out[1], short_oracle.Row(row - kJoins));
  }
}

// A chunk whose rows take turns with the norms, and the row after it.
TEST(GdnDecodeOnACpu, NormalisedRowsHaveTheGpusBits) {
  constexpr GatedNormCasts kCasts[] = {GatedNormCasts::kThree, GatedNormCasts::kTwo, GatedNormCasts::kOne};
  const Sequence sequence(kGdnChunk + 1, 3);
  const Oracle oracle(sequence);
  Layer layer(2);
  for (int row = 0; row < sequence.rows; ++row) {
    const GatedNormCasts casts = kCasts[row % 3];
    SCOPED_TRACE(testing::Message() << "row " << row);
    const std::vector<Bits> out = layer.Decode({{&sequence, row, 1}}, casts);
    const Bits o = oracle.Row(row), gate(&sequence.gate[row * kWidth], &sequence.gate[row * kWidth] + kWidth);
    ASSERT_EQ(out[0], NormOf(o, gate, casts));
    if (row % kGdnChunk == kGdnChunk - 1) ExpectEnd(layer, 1, oracle.ends[row / kGdnChunk]);
    if (casts != GatedNormCasts::kThree) continue;
    const NormWeight weight;
    Bits want(kWidth);
    for (int at = 0; at < kWidth; at += kGdnValueDim) {
      oracle::GatedRmsNorm({&o[at], kGdnValueDim}, weight.bf16, {&gate[at], kGdnValueDim}, kEps, &want[at]);
    }
    ASSERT_EQ(out[0], want);
  }
}

}  // namespace
}  // namespace lockstep::cuda

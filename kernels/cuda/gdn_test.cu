// Gated DeltaNet on a GPU: near the recurrence in fp64, and the same bits however a sequence is cut into prefill pieces
// and decoded rows, with the output norm in decode's launch or after it. Slots start as NaNs, so a read of what was
// never written shows. The trainer's own bits are compared by tests/gpu/check_gdn.py. Validate()'s and the layout's
// tests need no GPU; the others skip without one.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_prefill.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

using ::testing::HasSubstr;

constexpr int kConvWidth = 4;

struct Heads {
  int key = 1;
  int value = 1;

  int64_t channels() const { return GdnConvChannels(key, value); }
  int64_t out_width() const { return int64_t{value} * kGdnValueDim; }
};

// Rows of one sequence on the host: q | k | v with q and k of length 1 per head.
struct Inputs {
  Heads heads;
  int rows = 0;
  Bits qkv;              // [rows, channels]
  Bits beta;             // [rows, value heads], in (0, 2)
  std::vector<float> g;  // [rows, value heads], below 0
  Bits gate{};           // [rows, out_width], of the output norm
};

Inputs RandomInputs(Heads heads, int rows, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(0.02f, 1.98f);
  Inputs inputs = {.heads = heads,
                   .rows = rows,
                   .qkv = Bits(rows * heads.channels()),
                   .beta = Bits(static_cast<size_t>(rows) * heads.value),
                   .g = std::vector<float>(static_cast<size_t>(rows) * heads.value)};
  for (int row = 0; row < rows; ++row) {
    uint16_t* out = inputs.qkv.data() + row * heads.channels();
    for (int head = 0; head < 2 * heads.key; ++head) {
      std::vector<float> x(kGdnKeyDim);
      float squares = 0.0f;
      for (float& value : x) {
        value = normal(generator);
        squares += value * value;
      }
      for (const float value : x) *out++ = F32ToBf16(value / std::sqrt(squares));
    }
    for (int64_t c = 0; c < heads.out_width(); ++c) *out++ = F32ToBf16(normal(generator));
  }
  for (uint16_t& beta : inputs.beta) beta = F32ToBf16(uniform(generator));
  for (float& g : inputs.g) g = -0.2f * uniform(generator) * uniform(generator);
  for (int64_t i = 0; i < rows * heads.out_width(); ++i) inputs.gate.push_back(F32ToBf16(3.0f * normal(generator)));
  // Beside silu's fast range, and what has no silu.
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  size_t at = 5;
  for (const float gate : {-100.0f, -87.5f, -81.0f, -80.0f, 80.0f, 81.0f, 200.0f, kInfinity, -kInfinity}) {
    if (at < inputs.gate.size()) inputs.gate[at] = F32ToBf16(gate);
    at += 2 * kGdnValueDim + 17;
  }
  return inputs;
}

// Rows [begin, end) of `inputs`.
Inputs Slice(const Inputs& inputs, int begin, int end) {
  Inputs slice = {.heads = inputs.heads, .rows = end - begin, .qkv = {}, .beta = {}, .g = {}};
  const int64_t channels = inputs.heads.channels();
  const int value_heads = inputs.heads.value;
  slice.qkv.assign(inputs.qkv.begin() + begin * channels, inputs.qkv.begin() + end * channels);
  slice.beta.assign(inputs.beta.begin() + begin * value_heads, inputs.beta.begin() + end * value_heads);
  slice.g.assign(inputs.g.begin() + begin * value_heads, inputs.g.begin() + end * value_heads);
  const int64_t width = inputs.heads.out_width();
  slice.gate.assign(inputs.gate.begin() + begin * width, inputs.gate.begin() + end * width);
  return slice;
}

// Work of one step for one sequence. A decode piece without rows is padding: it has a row of the batch, which holds
// NaNs and must stay as it is.
struct Work {
  const Inputs* inputs;
  int slot;
  int position;
  int rows;
  bool decode;
};

// The output norm's weight of every test, as its casts take it.
class NormWeight {
 public:
  explicit NormWeight(GatedNormCasts casts)
      : casts_(casts), fp32_(RandomFloats(kGdnValueDim, 90, 1.0f, 0.3f)), bf16_(RandomBits(kGdnValueDim, 91)) {}
  const void* data() const { return casts_ == GatedNormCasts::kTwo ? static_cast<void*>(fp32_.data()) : bf16_.data(); }

 private:
  GatedNormCasts casts_;
  DeviceArray<float> fp32_;
  DeviceArray<uint16_t> bf16_;
};

constexpr float kNormEps = 1e-5f;
constexpr GatedNormCasts kAllCasts[] = {GatedNormCasts::kThree, GatedNormCasts::kTwo, GatedNormCasts::kOne};

// The gated norm of finished rows, by its own kernel.
Bits NormOf(const Bits& x, const Bits& gate, Heads heads, GatedNormCasts casts) {
  const NormWeight weight(casts);
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> device_gate(gate);
  const DeviceArray<uint16_t> out = Poisoned(x.size());
  const GatedRmsNormParams params = {.x = device_x.bf16(),
                                     .gate = device_gate.bf16(),
                                     .weight = weight.data(),
                                     .out = out.bf16(),
                                     .rows = static_cast<int64_t>(x.size()) / heads.out_width(),
                                     .heads = heads.value,
                                     .head_dim = kGdnValueDim,
                                     .x_stride = heads.out_width(),
                                     .gate_stride = heads.out_width(),
                                     .out_stride = heads.out_width(),
                                     .eps = kNormEps,
                                     .casts = casts};
  EXPECT_TRUE(LaunchGatedRmsNorm(params, nullptr).ok());
  return out.Host();
}

// One layer with its slots, all NaN at first.
class Layer {
 public:
  Layer(Heads heads, int slots, int workspace_tiles = 16)
      : heads_(heads),
        layout_(MakeGdnStateLayout(heads.key, heads.value, kConvWidth)),
        state_(std::vector<uint8_t>(slots * layout_.bytes, 0xFF)),
        workspace_(std::vector<uint8_t>(GdnPrefillWorkspaceBytes(heads.value, workspace_tiles), 0xFF)),
        workspace_bytes_(GdnPrefillWorkspaceBytes(heads.value, workspace_tiles)) {}

  // The output of every piece, one after the other. `work` has its decode pieces first; a padding piece and a padding
  // tile follow the prefill pieces. With `graph` the kernels run from a captured graph; with `norm` decode's applies
  // it.
  Bits Step(const std::vector<Work>& work, bool graph = false, std::optional<GatedNormCasts> norm = std::nullopt) {
    std::vector<DevicePiece> pieces;
    std::vector<DeviceTile> tiles;
    Inputs batch = {.heads = heads_, .rows = 0, .qkv = {}, .beta = {}, .g = {}};
    int decode_pieces = 0;
    for (const Work& w : work) {
      const Inputs rows = Slice(*w.inputs, w.position, w.position + w.rows);
      pieces.push_back({.row_begin = batch.rows, .row_count = w.rows, .position = w.position, .slot = w.slot});
      for (int done = 0; !w.decode && done < w.rows;) {
        const int position = w.position + done;
        const int count = std::min(w.rows - done, kGdnChunk - position % kGdnChunk);
        tiles.push_back({.piece = static_cast<int32_t>(pieces.size()) - 1,
                         .row_begin = batch.rows + done,
                         .row_count = count,
                         .position = position});
        done += count;
      }
      decode_pieces += w.decode;
      batch.rows += w.rows;
      batch.qkv.insert(batch.qkv.end(), rows.qkv.begin(), rows.qkv.end());
      batch.beta.insert(batch.beta.end(), rows.beta.begin(), rows.beta.end());
      batch.g.insert(batch.g.end(), rows.g.begin(), rows.g.end());
      batch.gate.insert(batch.gate.end(), rows.gate.begin(), rows.gate.end());
      if (w.decode && w.rows == 0) {
        ++batch.rows;
        batch.qkv.resize(batch.rows * heads_.channels(), kPoison);
        batch.beta.resize(static_cast<size_t>(batch.rows) * heads_.value, kPoison);
        batch.g.resize(static_cast<size_t>(batch.rows) * heads_.value, NAN);
        batch.gate.resize(batch.rows * heads_.out_width(), kPoison);
      }
    }
    // Rows of the output, and of the gates, are wider than they are used.
    const int64_t out_stride = heads_.out_width() + 8;
    const int64_t gate_stride = heads_.out_width() + 24;
    Bits wide_gate(batch.rows * gate_stride, kPoison);
    for (int row = 0; row < batch.rows; ++row) {
      std::copy_n(batch.gate.begin() + row * heads_.out_width(), heads_.out_width(),
                  wide_gate.begin() + row * gate_stride);
    }
    if (!tiles.empty()) {
      pieces.push_back({});
      tiles.push_back({});
    } else {
      tiles.resize(1);
    }
    const DeviceArray<uint16_t> qkv(batch.qkv);
    const DeviceArray<uint16_t> beta(batch.beta);
    const DeviceArray<float> g(batch.g);
    const DeviceArray<uint16_t> gate(wide_gate);
    const NormWeight norm_weight(norm.value_or(GatedNormCasts::kThree));
    const DeviceArray<uint16_t> out = Poisoned(batch.rows * out_stride);
    const DeviceArray<DevicePiece> device_pieces(pieces);
    const DeviceArray<DeviceTile> device_tiles(tiles);
    GdnParams params = {.q = qkv.bf16(),
                        .k = qkv.bf16() + heads_.key * kGdnKeyDim,
                        .v = qkv.bf16() + 2 * heads_.key * kGdnKeyDim,
                        .beta = beta.bf16(),
                        .g = g.data(),
                        .out = out.bf16(),
                        .q_stride = heads_.channels(),
                        .k_stride = heads_.channels(),
                        .v_stride = heads_.channels(),
                        .beta_stride = heads_.value,
                        .g_stride = heads_.value,
                        .out_stride = out_stride,
                        .key_heads = heads_.key,
                        .value_heads = heads_.value,
                        .state = reinterpret_cast<char*>(state_.data()),
                        .slot_stride = layout_.bytes,
                        .layout = layout_,
                        .batch = {}};
    params.batch.pieces = device_pieces.data();
    params.batch.tiles = device_tiles.data();
    params.batch.rows = batch.rows;
    params.batch.piece_count = static_cast<int32_t>(pieces.size());
    params.batch.decode_pieces = decode_pieces;
    params.batch.tile_count =
        work.size() == static_cast<size_t>(decode_pieces) ? 0 : static_cast<int32_t>(tiles.size());
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreate(&stream), cudaSuccess);
    if (graph) {
      EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    }
    if (norm.has_value()) {
      const GdnOutputNorm output_norm = {.gate = gate.bf16(),
                                         .weight = norm_weight.data(),
                                         .gate_stride = gate_stride,
                                         .eps = kNormEps,
                                         .casts = *norm};
      EXPECT_TRUE(LaunchGdnDecodeNorm(params, output_norm, stream).ok());
    } else {
      EXPECT_TRUE(LaunchGdnDecode(params, stream).ok());
    }
    const GdnPrefillParams prefill = {
        .gdn = params, .workspace = workspace_.data(), .workspace_bytes = workspace_bytes_};
    const absl::Status status = LaunchGdnPrefill(prefill, stream);
    EXPECT_TRUE(status.ok()) << status.ToString();
    if (graph) {
      cudaGraph_t captured = nullptr;
      cudaGraphExec_t executable = nullptr;
      EXPECT_EQ(cudaStreamEndCapture(stream, &captured), cudaSuccess);
      EXPECT_EQ(cudaGraphInstantiate(&executable, captured, 0), cudaSuccess);
      EXPECT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      cudaGraphExecDestroy(executable);
      cudaGraphDestroy(captured);
    }
    const Bits wide = out.Host();
    cudaStreamDestroy(stream);
    Bits result;
    for (auto row = wide.begin(); row != wide.end(); row += out_stride) {
      result.insert(result.end(), row, row + heads_.out_width());
      EXPECT_EQ(std::count(row + heads_.out_width(), row + out_stride, kPoison), out_stride - heads_.out_width());
    }
    return result;
  }

  // Bytes of the slot that position `position` may read, and nothing else.
  std::vector<uint8_t> WhatMatters(int slot, int position) const {
    const std::vector<uint8_t> state = state_.Host();
    const uint8_t* base = state.data() + slot * layout_.bytes;
    std::vector<uint8_t> bytes;
    const auto take = [&](int64_t begin, int64_t count) {
      bytes.insert(bytes.end(), base + begin, base + begin + count);
    };
    const int t = position % kGdnChunk;
    const int r = t / 16;
    const int64_t row_bytes = t % 16 * 64;
    for (int head = 0; head < heads_.value; ++head) {
      if (position >= kGdnChunk) {
        take(layout_.state_f32 + head * kGdnStateF32Bytes, kGdnStateF32Bytes);
        take(layout_.image + head * kGdnImageBytes, kGdnImageBytes);
      }
      take(layout_.k_rows + head * kGdnKeyRowsBytes, t * kGdnKeyRowsBytes / kGdnChunk);
      take(layout_.bv_rows + head * kGdnValueRowsBytes, t * kGdnValueRowsBytes / kGdnChunk);
      take(layout_.vp_rows + head * kGdnValueRowsBytes, t * kGdnValueRowsBytes / kGdnChunk);
      for (int part = 0; part < 3; ++part) {
        take(layout_.scalars + head * kGdnScalarBytes + part * kGdnScalarBytes / 3, t * 4);
      }
      const int64_t solve = layout_.solve + head * kGdnSolveBytes;
      const int finished = r * (r + 1) / 2;
      take(solve, finished * 1024);
      for (int block = 0; block <= r; ++block) take(solve + (finished + block) * 1024, row_bytes);
      for (int block = 0; block < r; ++block) take(solve + (10 + block) * 1024, row_bytes);
    }
    return bytes;
  }

 private:
  Heads heads_;
  GdnStateLayout layout_;
  DeviceArray<uint8_t> state_;
  DeviceArray<uint8_t> workspace_;
  int64_t workspace_bytes_;
};

Bits Prefill(Layer& layer, const Inputs& inputs, int slot = 0) {
  return layer.Step({{.inputs = &inputs, .slot = slot, .position = 0, .rows = inputs.rows, .decode = false}});
}

// Rows [begin, end) one by one.
Bits Decode(Layer& layer, const Inputs& inputs, int begin, int end, int slot = 0) {
  Bits out;
  for (int position = begin; position < end; ++position) {
    const Bits row = layer.Step({{.inputs = &inputs, .slot = slot, .position = position, .rows = 1, .decode = true}});
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

template <class T>
void ExpectSame(const std::vector<T>& got, const std::vector<T>& want) {
  ASSERT_EQ(got.size(), want.size());
  ASSERT_FALSE(want.empty());
  const auto [a, b] = std::mismatch(got.begin(), got.end(), want.begin());
  EXPECT_TRUE(a == got.end()) << "the first of " << want.size() << " differs at " << a - got.begin() << ": " << +*a
                              << ", want " << +*b;
}

// The recurrence, in fp64: S = e^g S; S += k (beta (v - S^T k))^T; o = S^T q / sqrt(96).
std::vector<double> Oracle(const Inputs& inputs) {
  const Heads heads = inputs.heads;
  std::vector<double> out(inputs.rows * heads.out_width());
  for (int head = 0; head < heads.value; ++head) {
    const int key_head = head / (heads.value / heads.key);
    std::vector<double> s(kGdnKeyDim * kGdnValueDim, 0.0);
    for (int row = 0; row < inputs.rows; ++row) {
      const uint16_t* q = inputs.qkv.data() + row * heads.channels() + key_head * kGdnKeyDim;
      const uint16_t* k = q + heads.key * kGdnKeyDim;
      const uint16_t* v = inputs.qkv.data() + row * heads.channels() + 2 * heads.key * kGdnKeyDim + head * kGdnValueDim;
      const double decay = std::exp(static_cast<double>(inputs.g[row * heads.value + head]));
      const double beta = Bf16ToF32(inputs.beta[row * heads.value + head]);
      for (int d = 0; d < kGdnValueDim; ++d) {
        double memory = 0.0;
        for (int x = 0; x < kGdnKeyDim; ++x) {
          s[x * kGdnValueDim + d] *= decay;
          memory += s[x * kGdnValueDim + d] * Bf16ToF32(k[x]);
        }
        const double added = beta * (Bf16ToF32(v[d]) - memory);
        double o = 0.0;
        for (int x = 0; x < kGdnKeyDim; ++x) {
          s[x * kGdnValueDim + d] += Bf16ToF32(k[x]) * added;
          o += s[x * kGdnValueDim + d] * Bf16ToF32(q[x]);
        }
        out[row * heads.out_width() + head * kGdnValueDim + d] = o / std::sqrt(96.0);
      }
    }
  }
  return out;
}

class Gdn : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

// A result passes through about eight roundings to bf16 (T, w, u, v', P, S, k's gates, o), each up to 2^-9 of its
// operand; with beta up to 2 the operands are up to twice the result. So 2^-5 of a row's norm bounds a row's error.
TEST_F(Gdn, NearTheRecurrence) {
  for (const Heads heads : {Heads{2, 2}, Heads{1, 2}}) {
    const Inputs inputs = RandomInputs(heads, 200, 1);
    const std::vector<double> want = Oracle(inputs);
    Layer layer(heads, 2);
    for (const Bits& out : {Prefill(layer, inputs), Decode(layer, inputs, 0, inputs.rows, 1)}) {
      ASSERT_EQ(out.size(), want.size());
      for (size_t begin = 0; begin < out.size(); begin += kGdnValueDim) {
        double error = 0.0;
        double norm = 0.0;
        for (size_t i = begin; i < begin + kGdnValueDim; ++i) {
          error += std::pow(Bf16ToF32(out[i]) - want[i], 2);
          norm += std::pow(want[i], 2);
        }
        ASSERT_LE(std::sqrt(error), 0x1p-5 * std::sqrt(norm)) << "row and head " << begin / kGdnValueDim;
      }
    }
  }
}

TEST_F(Gdn, DecodeHasPrefillsBits) {
  for (const Heads heads : {Heads{2, 2}, Heads{1, 3}}) {
    const Inputs inputs = RandomInputs(heads, 150, 2);
    Layer decoded(heads, 1);
    Bits out;
    for (int end = 1; end <= inputs.rows; ++end) {
      const Bits row = Decode(decoded, inputs, end - 1, end);
      out.insert(out.end(), row.begin(), row.end());
      SCOPED_TRACE(end);
      const Inputs prefix = Slice(inputs, 0, end);
      Layer prefilled(heads, 1);
      ExpectSame(out, Prefill(prefilled, prefix));
      ExpectSame(decoded.WhatMatters(0, end), prefilled.WhatMatters(0, end));
      if (HasFailure()) return;
    }
  }
}

TEST_F(Gdn, AnyCutHasTheSameBits) {
  const Heads heads = {2, 2};
  const Inputs inputs = RandomInputs(heads, 333, 3);
  Layer whole(heads, 1);
  const Bits want = Prefill(whole, inputs);
  std::mt19937 generator(4);
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(round);
    Layer layer(heads, 1, round % 2 == 0 ? 16 : 2);
    Bits out;
    std::string cuts;
    for (int position = 0; position < inputs.rows;) {
      const int longest = round % 3 == 0 ? 20 : 170;
      const int rows = std::min(inputs.rows - position, 1 + static_cast<int>(generator() % longest));
      const bool decode = rows == 1;
      const Bits piece =
          layer.Step({{.inputs = &inputs, .slot = 0, .position = position, .rows = rows, .decode = decode}});
      out.insert(out.end(), piece.begin(), piece.end());
      position += rows;
      cuts += std::to_string(position) + " ";
    }
    SCOPED_TRACE(cuts);
    ExpectSame(out, want);
    ExpectSame(layer.WhatMatters(0, inputs.rows), whole.WhatMatters(0, inputs.rows));
  }
}

// Other sequences in the batch, padding, a slot that another sequence has used, a captured graph: nothing shows.
TEST_F(Gdn, RowsDoNotDependOnTheBatch) {
  const Heads heads = {1, 2};
  const Inputs a = RandomInputs(heads, 140, 5);
  const Inputs b = RandomInputs(heads, 100, 6);
  const Inputs c = RandomInputs(heads, 70, 7);
  const auto alone = [&](const Inputs& inputs) {
    Layer layer(heads, 1);
    return Prefill(layer, inputs);
  };
  Layer layer(heads, 3);
  Prefill(layer, b, 0);  // what slot 0 held before
  Prefill(layer, Slice(a, 0, 139), 2);
  for (const bool graph : {false, true}) {
    const std::vector<Work> work = {{.inputs = &a, .slot = 2, .position = 139, .rows = 1, .decode = true},
                                    {.inputs = &b, .slot = 1, .position = 0, .rows = 100, .decode = false},
                                    {.inputs = &c, .slot = 0, .position = 0, .rows = 70, .decode = false}};
    const Bits out = layer.Step(work, graph);
    const Bits want_a = alone(a);
    Bits want(want_a.end() - heads.out_width(), want_a.end());
    for (const Inputs* inputs : {&b, &c}) {
      const Bits rows = alone(*inputs);
      want.insert(want.end(), rows.begin(), rows.end());
    }
    ExpectSame(out, want);
  }
}

// Value heads that share a key head are heads with equal q and k.
TEST_F(Gdn, SharedKeyHeads) {
  const Inputs shared = RandomInputs({2, 4}, 90, 8);
  Inputs repeated = {.heads = {4, 4}, .rows = 90, .qkv = {}, .beta = shared.beta, .g = shared.g, .gate = shared.gate};
  for (int row = 0; row < shared.rows; ++row) {
    const auto begin = shared.qkv.begin() + row * shared.heads.channels();
    for (int head = 0; head < 8; ++head) {
      const auto source = begin + head / 2 * kGdnKeyDim;
      repeated.qkv.insert(repeated.qkv.end(), source, source + kGdnKeyDim);
    }
    repeated.qkv.insert(repeated.qkv.end(), begin + 4 * kGdnKeyDim, begin + shared.heads.channels());
  }
  Layer shared_layer(shared.heads, 1);
  Layer repeated_layer(repeated.heads, 1);
  ExpectSame(Prefill(shared_layer, shared), Prefill(repeated_layer, repeated));
}

// Row by row over two chunk ends: the output is the norm's of the output without it, and the slots are the same.
TEST_F(Gdn, DecodeWithItsNormEqualsTheTwo) {
  for (const GatedNormCasts casts : kAllCasts) {
    for (const Heads heads : {Heads{2, 2}, Heads{1, 3}}) {
      const Inputs inputs = RandomInputs(heads, 140, 10);
      Layer apart(heads, 1);
      Layer together(heads, 1);
      for (int position = 0; position < inputs.rows; ++position) {
        SCOPED_TRACE(position);
        const std::vector<Work> work = {
            {.inputs = &inputs, .slot = 0, .position = position, .rows = 1, .decode = true}};
        const Bits x = apart.Step(work);
        ExpectSame(together.Step(work, false, casts),
                   NormOf(x, Slice(inputs, position, position + 1).gate, heads, casts));
        ExpectSame(together.WhatMatters(0, position + 1), apart.WhatMatters(0, position + 1));
        if (HasFailure()) return;
      }
    }
  }
}

// Decode rows at the start, in the middle and at the end of a chunk, padding between and after them, and prefill: whose
// rows decode leaves alone.
TEST_F(Gdn, DecodeWithItsNormInABatch) {
  const Heads heads = {2, 4};
  const Inputs a = RandomInputs(heads, 128, 11);
  const Inputs b = RandomInputs(heads, 65, 12);
  const Inputs c = RandomInputs(heads, 31, 13);
  const Inputs d = RandomInputs(heads, 100, 14);
  const std::vector<Work> before = {{.inputs = &a, .slot = 0, .position = 0, .rows = 127, .decode = false},
                                    {.inputs = &b, .slot = 1, .position = 0, .rows = 64, .decode = false},
                                    {.inputs = &c, .slot = 2, .position = 0, .rows = 30, .decode = false}};
  const Work padding = {.inputs = &a, .slot = 0, .position = 0, .rows = 0, .decode = true};
  const std::vector<Work> decode = {{.inputs = &a, .slot = 0, .position = 127, .rows = 1, .decode = true},
                                    padding,
                                    {.inputs = &b, .slot = 1, .position = 64, .rows = 1, .decode = true},
                                    {.inputs = &c, .slot = 2, .position = 30, .rows = 1, .decode = true},
                                    padding,
                                    padding};
  for (const bool prefill : {false, true}) {
    SCOPED_TRACE(prefill);
    std::vector<Work> work = decode;
    if (prefill) work.push_back({.inputs = &d, .slot = 3, .position = 0, .rows = 100, .decode = false});
    Layer apart(heads, 4);
    apart.Step(before);
    const Bits x = apart.Step(work);
    for (const GatedNormCasts casts : kAllCasts) {
      for (const bool graph : {false, true}) {
        SCOPED_TRACE(static_cast<int>(casts) * 2 + graph);
        Bits want = x;
        for (size_t row = 0; row < decode.size(); ++row) {
          if (work[row].rows == 0) continue;
          const auto begin = x.begin() + static_cast<int64_t>(row) * heads.out_width();
          const Bits normed =
              NormOf(Bits(begin, begin + heads.out_width()),
                     Slice(*work[row].inputs, work[row].position, work[row].position + 1).gate, heads, casts);
          std::copy(normed.begin(), normed.end(), want.begin() + static_cast<int64_t>(row) * heads.out_width());
        }
        EXPECT_EQ(std::count(want.begin(), want.end(), kPoison), 3 * heads.out_width());
        Layer together(heads, 4);
        together.Step(before);
        ExpectSame(together.Step(work, graph, casts), want);
        ExpectSame(together.WhatMatters(0, 128), apart.WhatMatters(0, 128));
        ExpectSame(together.WhatMatters(1, 65), apart.WhatMatters(1, 65));
        ExpectSame(together.WhatMatters(2, 31), apart.WhatMatters(2, 31));
        if (prefill) ExpectSame(together.WhatMatters(3, 100), apart.WhatMatters(3, 100));
      }
    }
  }
}

// More blocks than run at once, every row of a chunk among them.
TEST_F(Gdn, DecodeWithItsNormOfManySequences) {
  const Heads heads = {3, 6};
  const Inputs inputs = RandomInputs(heads, 65, 15);
  constexpr int kSlots = 128;
  std::vector<Work> before;
  std::vector<Work> work;
  for (int slot = 0; slot < kSlots; ++slot) {
    const int position = 1 + slot % 64;
    before.push_back({.inputs = &inputs, .slot = slot, .position = 0, .rows = position, .decode = false});
    work.push_back({.inputs = &inputs, .slot = slot, .position = position, .rows = 1, .decode = true});
  }
  Layer whole(heads, 1);
  const Bits x = Prefill(whole, inputs);
  for (const GatedNormCasts casts : kAllCasts) {
    const Bits normed = NormOf(x, inputs.gate, heads, casts);
    Bits want;
    for (const Work& w : work) {
      const auto row = normed.begin() + w.position * heads.out_width();
      want.insert(want.end(), row, row + heads.out_width());
    }
    Layer layer(heads, kSlots);
    layer.Step(before);
    ExpectSame(layer.Step(work, false, casts), want);
  }
}

// From here on no GPU is needed: addresses are never followed.
TEST(GdnState, PartsFollowEachOther) {
  const GdnStateLayout layout = MakeGdnStateLayout(30, 30, 4);
  EXPECT_EQ(layout.conv_tail, 0);
  EXPECT_EQ(layout.state_f32, 3 * 11520 * 2);
  EXPECT_EQ(layout.image - layout.state_f32, 30 * 96 * 192 * 4);
  EXPECT_EQ(layout.k_rows - layout.image, 30 * 96 * 192 * 2);
  EXPECT_EQ(layout.bv_rows - layout.k_rows, 30 * 64 * 96 * 2);
  EXPECT_EQ(layout.vp_rows - layout.bv_rows, 30 * 64 * 192 * 2);
  EXPECT_EQ(layout.solve - layout.vp_rows, 30 * 64 * 192 * 2);
  EXPECT_EQ(layout.scalars - layout.solve, 30 * 13 * 1024);
  EXPECT_EQ(layout.bytes - layout.scalars, 30 * 3 * 256);
  for (const int64_t heads : {1, 3, 7}) {
    const GdnStateLayout odd = MakeGdnStateLayout(heads, 2 * heads, 3);
    for (const int64_t part : {odd.state_f32, odd.image, odd.solve, odd.scalars, odd.bytes}) EXPECT_EQ(part % 256, 0);
  }
}

TEST(GdnState, EveryElementHasItsPlace) {
  std::set<int64_t> places;
  for (int dk = 0; dk < kGdnKeyDim; ++dk) {
    for (int dv = 0; dv < kGdnValueDim; ++dv) places.insert(GdnStateElement(dk, dv));
  }
  EXPECT_EQ(places.size(), static_cast<size_t>(kGdnKeyDim * kGdnValueDim));
  EXPECT_EQ(*places.begin(), 0);
  EXPECT_EQ(*places.rbegin(), kGdnKeyDim * kGdnValueDim - 1);
}

template <class T = __nv_bfloat16>
T* Address(uintptr_t address = 4096) {
  return reinterpret_cast<T*>(address);
}

GdnParams GoodParams() {
  GdnParams params = {.q = Address(),
                      .k = Address(),
                      .v = Address(),
                      .beta = Address(),
                      .g = Address<float>(),
                      .out = Address(),
                      .q_stride = 768,
                      .k_stride = 768,
                      .v_stride = 768,
                      .beta_stride = 2,
                      .g_stride = 2,
                      .out_stride = 384,
                      .key_heads = 2,
                      .value_heads = 2,
                      .state = Address<char>(),
                      .slot_stride = MakeGdnStateLayout(2, 2, kConvWidth).bytes,
                      .layout = MakeGdnStateLayout(2, 2, kConvWidth),
                      .batch = {}};
  params.batch.pieces = Address<const DevicePiece>();
  params.batch.tiles = Address<const DeviceTile>();
  params.batch.piece_count = 3;
  params.batch.decode_pieces = 1;
  params.batch.tile_count = 4;
  return params;
}

TEST(GdnValidate, NamesTheBadField) {
  ASSERT_TRUE(GoodParams().Validate().ok());
  const auto expect_refused = [](const char* field, const std::function<void(GdnParams&)>& change) {
    GdnParams params = GoodParams();
    change(params);
    const absl::Status status = params.Validate();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
    EXPECT_EQ(LaunchGdnDecode(params, nullptr), status);
    EXPECT_EQ(LaunchGdnPrefill({.gdn = params}, nullptr), status);
  };
  expect_refused(".key_heads", [](GdnParams& p) { p.key_heads = 0; });
  expect_refused(".value_heads", [](GdnParams& p) { p.value_heads = 3; });
  expect_refused(".value_heads", [](GdnParams& p) { p.value_heads = 0; });
  expect_refused(".q", [](GdnParams& p) { p.q = nullptr; });
  expect_refused(".k", [](GdnParams& p) { p.k = Address(4098); });
  expect_refused(".v_stride", [](GdnParams& p) { p.v_stride = 380; });
  expect_refused(".v_stride", [](GdnParams& p) { p.v_stride = 388; });
  expect_refused(".beta_stride", [](GdnParams& p) { p.beta_stride = 1; });
  expect_refused(".g", [](GdnParams& p) { p.g = Address<float>(4098); });
  expect_refused(".out_stride", [](GdnParams& p) { p.out_stride = 376; });
  expect_refused(".state", [](GdnParams& p) { p.state = Address<char>(4096 + 128); });
  expect_refused(".layout", [](GdnParams& p) { p.layout = GdnStateLayout(); });
  expect_refused(".slot_stride", [](GdnParams& p) { p.slot_stride -= 256; });
  expect_refused(".slot_stride", [](GdnParams& p) { p.slot_stride += 128; });
  expect_refused(".piece_count", [](GdnParams& p) { p.batch.piece_count = 0; });
  expect_refused(".tile_count", [](GdnParams& p) { p.batch.tile_count = -1; });
  expect_refused(".pieces", [](GdnParams& p) { p.batch.pieces = nullptr; });
  expect_refused(".tiles", [](GdnParams& p) { p.batch.tiles = nullptr; });
}

TEST(GdnValidate, TheNormNamesTheBadField) {
  const GdnOutputNorm good = {.gate = Address(), .weight = Address(), .gate_stride = 392, .eps = 1e-5f};
  ASSERT_TRUE(good.Validate(2).ok());
  const auto expect_refused = [&](const char* field, const std::function<void(GdnOutputNorm&)>& change) {
    GdnOutputNorm norm = good;
    change(norm);
    const absl::Status status = norm.Validate(2);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
    EXPECT_EQ(LaunchGdnDecodeNorm(GoodParams(), norm, nullptr), status);
  };
  expect_refused(".gate:", [](GdnOutputNorm& n) { n.gate = nullptr; });
  expect_refused(".gate:", [](GdnOutputNorm& n) { n.gate = Address(4104); });
  expect_refused(".weight:", [](GdnOutputNorm& n) { n.weight = nullptr; });
  expect_refused(".weight:", [](GdnOutputNorm& n) { n.weight = Address(4104); });
  expect_refused(".gate_stride", [](GdnOutputNorm& n) { n.gate_stride = 376; });
  expect_refused(".gate_stride", [](GdnOutputNorm& n) { n.gate_stride = 388; });
  expect_refused(".eps", [](GdnOutputNorm& n) { n.eps = -1.0f; });
  expect_refused(".eps", [](GdnOutputNorm& n) { n.eps = NAN; });
  expect_refused(".eps", [](GdnOutputNorm& n) { n.eps = INFINITY; });
  GdnParams params = GoodParams();
  params.value_heads = 3;
  EXPECT_EQ(LaunchGdnDecodeNorm(params, good, nullptr), params.Validate());
  params = GoodParams();
  params.batch.decode_pieces = 0;
  EXPECT_TRUE(LaunchGdnDecodeNorm(params, good, nullptr).ok());
}

TEST(GdnValidate, PrefillNeedsAWorkspace) {
  GdnPrefillParams params = {
      .gdn = GoodParams(), .workspace = Address<char>(), .workspace_bytes = GdnPrefillWorkspaceBytes(2, 1)};
  EXPECT_TRUE(params.Validate().ok());
  params.workspace_bytes -= 1;
  EXPECT_THAT(std::string(params.Validate().message()), HasSubstr(".workspace_bytes"));
  params.workspace = nullptr;
  EXPECT_THAT(std::string(params.Validate().message()), HasSubstr(".workspace:"));
  params.gdn.batch.tile_count = 0;
  EXPECT_TRUE(params.Validate().ok());
}

}  // namespace
}  // namespace lockstep::cuda

// A Gated DeltaNet layer through the backend: the chunk program and its norm in one operation against the two, over
// steps of prefill, of both, and of recorded decode. Skips without a GPU.
#include <cuda_runtime_api.h>

#include <bit>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

constexpr GdnShape kShape = {.key_heads = 2, .value_heads = 4, .key_dim = 96, .value_dim = 192};
constexpr int64_t kMaxRows = 256;
constexpr int64_t kInWidth = 2048;  // q k v g a b and some more
constexpr float kEps = 1e-5f;

std::vector<float> RandomValues(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// Rows of one sequence in a step: those from `position` on.
struct Part {
  int32_t slot;
  int64_t position;
  int64_t rows;
};

class CudaGdnLayer : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    auto ops = CudaOps::Create(FindNumericsProfile(GetParam()).value(), &threads_, {});
    ASSERT_TRUE(ops.ok()) << ops.status();
    ops_ = *std::move(ops);
    memory_ = Room(kMaxRows * kInWidth * 5);
    in_ = Take(kInWidth, DType::kBF16);
    conv_ = Take(kShape.conv_channels(), DType::kBF16);
    beta_ = Take(64, DType::kBF16);
    g_ = Take(64, DType::kF32);
    out_ = Take(kShape.value_width(), DType::kBF16);
    slot_bytes_ = (ops_->GdnStateBytes(kShape) + 255) / 256 * 256;
    const bool fp32_norm = ops_->profile().gated_norm == GatedNormCasts::kTwo;
    weight_ = ops_->PackVector(RandomValues(kShape.conv_channels() * 4, 1), false).value();
    a_log_ = ops_->PackVector(RandomValues(kShape.value_heads, 2), true).value();
    dt_bias_ = ops_->PackVector(RandomValues(kShape.value_heads, 3), true).value();
    norm_ = ops_->PackVector(RandomValues(kShape.value_dim, 4), fp32_norm).value();
  }

  std::unique_ptr<DeviceMemory> Room(int64_t bytes) { return ops_->Allocate(bytes).value(); }

  // Runs the layer over the parts and returns its rows, padding left out.
  std::vector<float> Step(const std::vector<Part>& parts, DeviceMemory& states, bool together) {
    std::vector<Piece> pieces;
    std::vector<int64_t> positions;
    std::vector<uint16_t> in;
    for (const Part& part : parts) {
      pieces.push_back({.row_begin = static_cast<int64_t>(positions.size()),
                        .row_count = part.rows,
                        .position = part.position,
                        .slot = part.slot});
      for (int64_t p = part.position; p < part.position + part.rows; ++p) {
        positions.push_back(p);
        for (const float x : RandomValues(kInWidth, static_cast<uint32_t>(1000 * part.slot + p))) {
          in.push_back(F32ToBf16(x));
        }
      }
    }
    const auto rows = static_cast<int64_t>(positions.size());
    const std::vector<int32_t> tokens(rows, 0);
    std::vector<int64_t> logit_rows(rows);
    std::iota(logit_rows.begin(), logit_rows.end(), 0);
    in.resize(kMaxRows * kInWidth, 0xFFFF);
    ops_->CopyFromHost(static_cast<std::byte*>(in_.data), reinterpret_cast<const std::byte*>(in.data()),
                       static_cast<int64_t>(in.size()) * 2);
    const std::vector<std::byte> poison(kMaxRows * out_.stride * 2, std::byte{0xFF});
    ops_->CopyFromHost(static_cast<std::byte*>(out_.data), poison.data(), static_cast<int64_t>(poison.size()));
    const StepRows step = ops_->BeginStep(
        {.tokens = tokens, .positions = positions, .pieces = pieces, .logit_rows = logit_rows, .page_size = 0});
    ops_->RunStep(&states, [&] { Layer(step.rows, states, together); });
    const std::vector<float> got = ops_->Download(out_.slice(0, rows));
    EXPECT_TRUE(ops_->status().ok()) << GetParam();
    return got;
  }

 private:
  Rows Take(int64_t width, DType dtype) {
    const Rows rows = {memory_->data() + taken_, kMaxRows, width, width, dtype};
    taken_ += kMaxRows * width * DTypeBytes(dtype);
    EXPECT_LE(taken_, memory_->bytes());
    return rows;
  }

  void Layer(int64_t rows, DeviceMemory& states, bool together) {
    const GdnLayer layer = {.base = states.data(), .slot_stride = slot_bytes_};
    const int64_t channels = kShape.conv_channels();
    const int64_t values = kShape.value_width();
    const int64_t heads = kShape.value_heads;
    const Rows in = in_.slice(0, rows);
    const Rows beta = beta_.slice(0, rows).columns(0, heads);
    const Rows g = g_.slice(0, rows).columns(0, heads);
    const Rows conv = conv_.slice(0, rows);
    const Rows gate = in.columns(channels, values);
    const Rows out = out_.slice(0, rows);
    ops_->GdnConvAndGates(in.columns(0, channels), *weight_, kShape, layer, conv,
                          {.a = in.columns(channels + values, heads),
                           .b = in.columns(channels + values + heads, heads),
                           .a_log = *a_log_,
                           .dt_bias = *dt_bias_,
                           .neg_eigval = true,
                           .beta = beta,
                           .g = g});
    if (together) {
      ops_->GdnChunkNorm(conv, beta, g, kShape, layer, gate, *norm_, kEps, out);
    } else {
      ops_->GdnChunk(conv, beta, g, kShape, layer, out);
      ops_->GatedRmsNorm(out, gate, *norm_, kEps, kShape.value_dim, out);
    }
  }

 protected:
  ThreadPool threads_{2};
  std::unique_ptr<CudaOps> ops_;
  int64_t slot_bytes_ = 0;

 private:
  std::unique_ptr<DeviceMemory> memory_;
  int64_t taken_ = 0;
  Rows in_, conv_, beta_, g_, out_;
  std::unique_ptr<VectorWeight> weight_, a_log_, dt_bias_, norm_;
};

std::vector<uint32_t> Words(const std::vector<float>& values) {
  std::vector<uint32_t> words;
  for (const float value : values) words.push_back(std::bit_cast<uint32_t>(value));
  return words;
}

TEST_P(CudaGdnLayer, ChunkAndNormTogetherEqualTheTwo) {
  const std::vector<std::vector<Part>> steps = {
      // Prefill.
      {{.slot = 0, .position = 0, .rows = 63}, {.slot = 1, .position = 0, .rows = 7}},
      // Decode and prefill; the last row of the second batch is a tile of its own.
      {{.slot = 0, .position = 63, .rows = 1}, {.slot = 2, .position = 0, .rows = 130}},
      {{.slot = 1, .position = 7, .rows = 1},
       {.slot = 0, .position = 64, .rows = 1},
       {.slot = 2, .position = 130, .rows = 3},
       {.slot = 3, .position = 0, .rows = 1}},
      // Recorded with a row of padding, then replayed without one.
      {{.slot = 0, .position = 65, .rows = 1},
       {.slot = 1, .position = 8, .rows = 1},
       {.slot = 2, .position = 133, .rows = 1}},
      {{.slot = 2, .position = 134, .rows = 1},
       {.slot = 3, .position = 1, .rows = 1},
       {.slot = 1, .position = 9, .rows = 1},
       {.slot = 0, .position = 66, .rows = 1}}};
  const auto apart = Room(4 * slot_bytes_);
  const auto together = Room(4 * slot_bytes_);
  for (const std::vector<Part>& step : steps) {
    const std::vector<float> want = Step(step, *apart, false);
    const std::vector<float> got = Step(step, *together, true);
    ASSERT_EQ(Words(got), Words(want)) << step.size() << " pieces from position " << step[0].position;
    for (const float value : got) ASSERT_EQ(value, value) << "a NaN";
  }
  ops_->ForgetSteps(apart.get());
  ops_->ForgetSteps(together.get());
}

std::string ProfileName(const ::testing::TestParamInfo<std::string>& profile) {
  std::string name = profile.param;
  std::erase(name, '-');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Profiles, CudaGdnLayer, ::testing::Values("hf", "hf-autocast", "olmo-core"), ProfileName);

}  // namespace
}  // namespace lockstep::cuda

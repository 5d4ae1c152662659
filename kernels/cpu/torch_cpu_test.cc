// Profile hf-torch against PyTorch's and transformers' own results on a CPU with AVX512-BF16, in bits
// (tests/data/torch_cpu, written by tools/make_torch_cpu_fixture.py), on every instruction set.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/gdn_chunk.h"
#include "kernels/cpu/gdn_gates.h"
#include "kernels/cpu/kv_cache.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cpu/test_util.h"

namespace lockstep {
namespace {

using testing::ForEachTarget;
using testing::TestContext;

std::vector<char> ReadBytes(const std::string& name) {
  const std::string path = std::string(LOCKSTEP_TEST_DATA) + "/torch_cpu/" + name;
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A fixture's matrix of `width` columns, bf16 ones as fp32 words.
class Fixture {
 public:
  Fixture(const std::string& name, int64_t width) : width_(width) {
    const std::vector<char> bytes = ReadBytes(name);
    if (name.ends_with(".f32")) {
      values_.resize(bytes.size() / sizeof(float));
      std::memcpy(values_.data(), bytes.data(), values_.size() * sizeof(float));
    } else {
      std::vector<uint16_t> bits(bytes.size() / sizeof(uint16_t));
      std::memcpy(bits.data(), bytes.data(), bits.size() * sizeof(uint16_t));
      for (const uint16_t b : bits) values_.push_back(Bf16ToF32(b));
    }
    EXPECT_GT(values_.size(), 0u);
    EXPECT_EQ(values_.size() % width, 0u);
  }
  // A zeroed matrix of the same shape.
  Fixture Zeros() const {
    Fixture zeros = *this;
    std::fill(zeros.values_.begin(), zeros.values_.end(), 0.0f);
    return zeros;
  }

  int64_t rows() const { return static_cast<int64_t>(values_.size()) / width_; }
  Rows view() { return {values_.data(), rows(), width_, width_}; }
  const float* data() const { return values_.data(); }
  HostMatrix host() const { return {values_.data(), rows(), width_, DType::kF32}; }
  int64_t Differing(const Fixture& other) const {
    EXPECT_EQ(values_.size(), other.values_.size());
    int64_t differing = 0;
    for (size_t i = 0; i < values_.size(); ++i)
      differing += std::bit_cast<uint32_t>(values_[i]) != std::bit_cast<uint32_t>(other.values_[i]);
    return differing;
  }

 private:
  int64_t width_;
  std::vector<float> values_;
};

TEST(TorchCpu, Linear) {
  for (const int64_t k : {97, 600, 1100}) {
    const std::string name = "linear" + std::to_string(k);
    Fixture x(name + "_x.bf16", k);
    const Fixture weight(name + "_w.bf16", k);
    const Fixture want(name + "_y.bf16", weight.rows());
    TestContext context("hf-torch");
    const HostMatrix host = weight.host();
    const auto packed = CpuPackLinear(context.get(), {&host, 1});
    ForEachTarget([&] {
      Fixture got = want.Zeros();
      CpuLinear(context.get(), x.view(), *packed, got.view());
      EXPECT_EQ(got.Differing(want), 0) << "K " << k;
    });
  }
}

TEST(TorchCpu, RmsNorm) {
  for (const int64_t width : {40, 200, 1000}) {
    const std::string name = "norm" + std::to_string(width);
    Fixture x(name + "_x.bf16", width);
    const Fixture weight(name + "_w.bf16", width);
    const Fixture want(name + "_y.bf16", width);
    TestContext context("hf-torch");
    ForEachTarget([&] {
      Fixture got = want.Zeros();
      CpuRmsNorm(context.get(), x.view(), weight.data(), 1e-6f, got.view());
      EXPECT_EQ(got.Differing(want), 0) << "width " << width;
    });
  }
}

TEST(TorchCpu, Attention) {
  const AttentionShape shape = {.heads = 1, .kv_heads = 1, .head_dim = 16, .window = 0, .scale = 0.25f};
  Fixture q("attention_q.bf16", 16);
  Fixture k("attention_k.bf16", 16);
  Fixture v("attention_v.bf16", 16);
  const Fixture want("attention_y.bf16", 16);
  TestContext context("hf-torch");
  const std::vector<int32_t> table = {0};
  const Piece piece = {.row_begin = 0, .row_count = q.rows(), .position = 0, .page_table = table.data()};
  AlignedBuffer page(CpuKvPageBytes(context.get(), shape, q.rows()));
  const KvLayer kv = {.base = page.data(), .page_size = q.rows()};
  CpuWriteKv(context.get(), k.view(), v.view(), shape, {&piece, 1}, kv);
  ForEachTarget([&] {
    Fixture got = want.Zeros();
    CpuAttention(context.get(), q.view(), shape, {&piece, 1}, kv, got.view());
    EXPECT_EQ(got.Differing(want), 0);
  });
}

// PyTorch's e^x (oneMKL's) is the nearest fp32 value in 99 of 100 cases and Lockstep's in 98, so a few elements may
// round the other way where there is decay.
TEST(TorchCpu, GatedDeltaRule) {
  const GdnShape shape = {.key_heads = 2, .value_heads = 2, .key_dim = 24, .value_dim = 40};
  Fixture qkv("gdn_qkv.bf16", shape.conv_channels());
  Fixture beta("gdn_beta.bf16", 2);
  for (const bool decays : {false, true}) {
    const std::string name = decays ? "gdn_decaying" : "gdn_still";
    Fixture g(name + "_g.f32", 2);
    const Fixture want(name + "_y.bf16", shape.value_width());
    TestContext context("hf-torch");
    ForEachTarget([&] {
      AlignedBuffer slot(CpuGdnStateBytes(context.get(), shape));
      CpuGdnResetState(context.get(), shape, slot.data());
      const Piece piece = {.row_begin = 0, .row_count = qkv.rows(), .position = 0, .gdn_state = slot.data()};
      Fixture got = want.Zeros();
      CpuGdnChunk(context.get(), qkv.view(), beta.view(), g.view(), shape, {&piece, 1}, got.view());
      EXPECT_LE(got.Differing(want), decays ? qkv.rows() * shape.value_width() / 2000 : 0) << name;
    });
  }
}

TEST(TorchCpu, Gates) {
  Fixture a("gates_a.bf16", 16);
  Fixture b("gates_b.bf16", 16);
  const Fixture a_log("gates_a_log.bf16", 16);
  const Fixture dt_bias("gates_dt_bias.bf16", 16);
  const Fixture want_beta("gates_beta.bf16", 16);
  const Fixture want_g("gates_g.f32", 16);
  TestContext context("hf-torch");
  ForEachTarget([&] {
    Fixture beta = want_beta.Zeros();
    Fixture g = want_g.Zeros();
    CpuGdnGates(context.get(), a.view(), b.view(), a_log.data(), dt_bias.data(), true, beta.view(), g.view());
    EXPECT_EQ(beta.Differing(want_beta), 0);
    EXPECT_EQ(g.Differing(want_g), 0);
  });
}

}  // namespace
}  // namespace lockstep

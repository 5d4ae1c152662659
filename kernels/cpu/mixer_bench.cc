// Times of the token mixers, GDN's chunk program and attention, at the 7B's head sizes: microseconds per token and
// head, and the bandwidth reached.
//
//   mixer_bench [threads]
//
// A decode token of GDN reads its head's S (or bf16 image) and the open chunk, on average half full; every 64th writes
// S. Bytes counted: that mean. A decode token of attention reads the K and V of its context once. Prefill is one
// sequence in one piece.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/gdn_chunk.h"
#include "kernels/cpu/gdn_conv.h"
#include "kernels/cpu/kv_cache.h"

namespace lockstep {
namespace {

double Seconds(const std::function<void()>& fn) {
  const auto begin = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Buffer {
  Buffer(int64_t rows, int64_t width, float low, float high)
      : data(rows * width), view{data.data(), rows, width, width} {
    std::mt19937 rng(1);
    std::uniform_real_distribution<float> uniform(low, high);
    for (float& x : data) x = uniform(rng);
  }
  std::vector<float> data;
  Rows view;
};

struct Backend {
  Backend(const std::string& name, int threads)
      : profile(FindNumericsProfile(name).value()), pool(threads), scratch(threads), ctx{profile, pool, scratch} {}
  NumericsProfile profile;
  ThreadPool pool;
  ThreadScratch scratch;
  CpuContext ctx;
};

void BenchGdn(const std::string& name, int threads) {
  Backend backend(name, threads);
  const CpuContext& ctx = backend.ctx;
  const GdnShape shape = {.key_heads = 8, .value_heads = 8, .key_dim = 96, .value_dim = 192};
  constexpr int64_t kSequences = 32;
  constexpr int64_t kSteps = 128;
  constexpr int64_t kPrefill = 2048;
  const int64_t rows = std::max(kSequences, kPrefill);
  Buffer qkv(rows, shape.conv_channels(), -1.0f, 1.0f), beta(rows, shape.value_heads, 0.0f, 2.0f),
      g(rows, shape.value_heads, -0.2f, 0.0f);
  Buffer out(rows, shape.value_width(), 0.0f, 0.0f);
  const int64_t slot = CpuGdnStateBytes(ctx, shape);
  AlignedBuffer slots(kSequences * slot);
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < kSequences; ++s) {
    CpuGdnResetState(ctx, shape, slots.data() + s * slot);
    pieces.push_back({.row_begin = s, .row_count = 1, .position = 0, .gdn_state = slots.data() + s * slot});
  }
  const auto decode = [&] {
    CpuGdnChunk(ctx, qkv.view, beta.view, g.view, shape, pieces, out.view);
    for (Piece& piece : pieces) ++piece.position;
  };
  // Past the first chunk, where S is zero and not read.
  for (int64_t i = 0; i < kGdnChunk; ++i) decode();
  const double seconds = Seconds([&] {
    for (int64_t i = 0; i < kSteps; ++i) decode();
  });
  const double tokens = static_cast<double>(kSteps * kSequences * shape.value_heads);
  const double element = backend.profile.gdn == GdnProgram::kChunkBf16 ? 2.0 : 4.0;
  // kChunkBf16: keys, bf16(beta v), bf16(beta k 2^G), v' and T of 32 rows; kChunkFp32: keys, u, w and v'.
  const double key_bytes = static_cast<double>(DTypeBytes(backend.profile.activations));
  const double open = backend.profile.gdn == GdnProgram::kChunkBf16 ? 32.0 * (96 * 4 + 192 * 4 + 64 * 4)
                                                                    : 32.0 * (96 * key_bytes + (192 + 96 + 192) * 4);
  const double state = 96 * 192;
  const double bytes = state * element + open + (2 * state * 4 + 64 * 192 * 4) / 64.0;
  std::printf("gdn %-8s %d threads  decode  %6.2f us/token/head (one thread's time %6.2f)  %6.1f GB/s\n", name.c_str(),
              threads, seconds / tokens * 1e6, seconds / tokens * 1e6 * threads, bytes * tokens / seconds * 1e-9);

  CpuGdnResetState(ctx, shape, slots.data());
  Piece prefill = {.row_begin = 0, .row_count = kPrefill, .position = 0, .gdn_state = slots.data()};
  const double prefill_seconds = Seconds([&] {
    CpuGdnChunk(ctx, qkv.view, beta.view, g.view, shape, {&prefill, 1}, out.view);
  });
  const double prefill_tokens = static_cast<double>(kPrefill * shape.value_heads);
  // Multiply-adds of a row: k and q against S, keys and v' (half a chunk on average, twice each), and its share of the
  // boundary's update.
  const double flops = 2.0 * (2 * state + 32.0 * 2 * (96 + 192) + state);
  std::printf("gdn %-8s %d threads  prefill %6.2f us/token/head (one thread's time %6.2f)  %6.1f GFLOP/s\n",
              name.c_str(), threads, prefill_seconds / prefill_tokens * 1e6,
              prefill_seconds / prefill_tokens * 1e6 * threads, flops * prefill_tokens / prefill_seconds * 1e-9);

  Buffer conv_weight(1, shape.conv_channels() * 4, -0.5f, 0.5f);
  Buffer conv_out(rows, shape.conv_channels(), 0.0f, 0.0f);
  const double conv_decode = Seconds([&] {
    for (int64_t i = 0; i < kSteps; ++i)
      CpuGdnConv(ctx, qkv.view, conv_weight.data.data(), shape, pieces, conv_out.view);
  });
  const double conv_prefill = Seconds([&] {
    CpuGdnConv(ctx, qkv.view, conv_weight.data.data(), shape, {&prefill, 1}, conv_out.view);
  });
  std::printf("conv %-8s %d threads decode  %6.3f us/token/head, prefill %6.3f\n", name.c_str(), threads,
              conv_decode / tokens * 1e6, conv_prefill / prefill_tokens * 1e6);
}

void BenchAttention(const std::string& name, int threads, int64_t kv_heads, int64_t sequences, int64_t context) {
  Backend backend(name, threads);
  const CpuContext& ctx = backend.ctx;
  const AttentionShape shape = {.heads = 8, .kv_heads = kv_heads, .head_dim = 128, .scale = 0.088388f};
  constexpr int64_t kPage = 64;
  const int64_t pages = (context + kPage - 1) / kPage;
  const int64_t page_bytes = CpuKvPageBytes(ctx, shape, kPage);
  AlignedBuffer memory(sequences * pages * page_bytes);
  KvLayer kv = {.base = memory.data(), .page_size = kPage};
  std::vector<std::vector<int32_t>> tables(sequences);
  Buffer k(context, kv_heads * 128, -1.0f, 1.0f), v(context, kv_heads * 128, -1.0f, 1.0f);
  const int64_t prefill_rows = std::min<int64_t>(context, 1024);
  Buffer q(std::max(sequences, prefill_rows), shape.heads * 128, -1.0f, 1.0f),
      out(q.view.rows, q.view.width, 0.0f, 0.0f);
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t p = 0; p < pages; ++p) tables[s].push_back(static_cast<int32_t>(p * sequences + s));
    const Piece all = {.row_begin = 0, .row_count = context, .position = 0, .page_table = tables[s].data()};
    CpuWriteKv(ctx, k.view, v.view, shape, {&all, 1}, kv);
    pieces.push_back({.row_begin = s, .row_count = 1, .position = context - 1, .page_table = tables[s].data()});
  }
  const int64_t steps = std::max<int64_t>(1, 400000 / (sequences * context));
  CpuAttention(ctx, q.view, shape, pieces, kv, out.view);
  const double seconds = Seconds([&] {
    for (int64_t i = 0; i < steps; ++i) CpuAttention(ctx, q.view, shape, pieces, kv, out.view);
  });
  const double bytes =
      static_cast<double>(steps * sequences * context * kv_heads * 2 * 128 * DTypeBytes(backend.profile.kv));
  std::printf(
      "attention %-8s %d threads, 8 heads, %ld kv heads, %2ld x %5ld keys  decode %6.1f GB/s  %8.2f us/token/head\n",
      name.c_str(), threads, static_cast<long>(kv_heads), static_cast<long>(sequences), static_cast<long>(context),
      bytes / seconds * 1e-9, seconds / static_cast<double>(steps * sequences * shape.heads) * 1e6);
  const Piece prefill = {
      .row_begin = 0, .row_count = prefill_rows, .position = context - prefill_rows, .page_table = tables[0].data()};
  const double prefill_seconds = Seconds([&] { CpuAttention(ctx, q.view, shape, {&prefill, 1}, kv, out.view); });
  const double pairs =
      static_cast<double>(prefill_rows) * (static_cast<double>(context) - static_cast<double>(prefill_rows) / 2);
  std::printf("attention %-8s %d threads, last %ld rows of %ld as one piece  %6.1f GFLOP/s\n", name.c_str(), threads,
              static_cast<long>(prefill_rows), static_cast<long>(context),
              4.0 * 128 * static_cast<double>(shape.heads) * pairs / prefill_seconds * 1e-9);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  for (const char* name : {"fp32", "hf-torch", "hf"}) lockstep::BenchGdn(name, threads);
  for (const char* name : {"fp32", "hf"}) {
    lockstep::BenchAttention(name, threads, 8, 32, 512);
    lockstep::BenchAttention(name, threads, 2, 32, 512);
    lockstep::BenchAttention(name, threads, 8, 1, 16384);
  }
  return 0;
}

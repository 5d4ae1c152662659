// Times Gated DeltaNet's kernels on random inputs, heads as in Olmo Hybrid 7B, and prints them beside the bytes they
// must move. `gdn_bench decode`, `gdn_bench norm` (decode with the output norm after it and in its launch), `gdn_bench
// prefill`; `gdn_bench once BATCH T` launches decode three times for a profiler.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gdn_decode.h"
#include "kernels/cuda/gdn_prefill.h"
#include "kernels/float_bits.h"

namespace lockstep::cuda {
namespace {

constexpr int kHeads = 30;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

template <class T>
T* ToDevice(const std::vector<T>& host) {
  T* device = nullptr;
  Check(cudaMalloc(&device, host.size() * sizeof(T)));
  Check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

// A layer with `slots` slots and the inputs of `rows` rows; never freed.
GdnParams MakeLayer(int rows, int slots) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const int64_t channels = GdnConvChannels(kHeads, kHeads);
  std::vector<uint16_t> row(channels);
  for (uint16_t& x : row) x = F32ToBf16(normal(generator) * 0.1f);
  std::vector<uint16_t> qkv;
  for (int r = 0; r < rows; ++r) qkv.insert(qkv.end(), row.begin(), row.end());
  const auto* device = reinterpret_cast<const __nv_bfloat16*>(ToDevice(qkv));
  GdnParams params = {.q = device,
                      .k = device + kHeads * kGdnKeyDim,
                      .v = device + 2 * kHeads * kGdnKeyDim,
                      .beta = reinterpret_cast<const __nv_bfloat16*>(
                          ToDevice(std::vector<uint16_t>(static_cast<size_t>(rows) * kHeads, F32ToBf16(0.5f)))),
                      .g = ToDevice(std::vector<float>(static_cast<size_t>(rows) * kHeads, -0.1f)),
                      .out = nullptr,
                      .q_stride = channels,
                      .k_stride = channels,
                      .v_stride = channels,
                      .beta_stride = kHeads,
                      .g_stride = kHeads,
                      .out_stride = kHeads * kGdnValueDim,
                      .key_heads = kHeads,
                      .value_heads = kHeads,
                      .state = nullptr,
                      .slot_stride = 0,
                      .layout = MakeGdnStateLayout(kHeads, kHeads, 4),
                      .batch = {}};
  params.slot_stride = params.layout.bytes;
  Check(cudaMalloc(&params.out, int64_t{2} * rows * params.out_stride));
  Check(cudaMalloc(&params.state, slots * params.slot_stride));
  Check(cudaMemset(params.state, 0, slots * params.slot_stride));
  return params;
}

// Microseconds of one of `count` launches in a CUDA graph, the best of five replays.
double Time(int count, const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Check(cudaStreamCreate(&stream));
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < count; ++i) launch(i, stream);
  Check(cudaStreamEndCapture(stream, &graph));
  Check(cudaGraphInstantiate(&executable, graph, 0));
  float best = 1e30f;
  for (int replay = 0; replay < 6; ++replay) {
    Check(cudaEventRecord(begin, stream));
    Check(cudaGraphLaunch(executable, stream));
    Check(cudaEventRecord(end, stream));
    Check(cudaStreamSynchronize(stream));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end));
    if (replay > 0 && ms < best) best = ms;
  }
  return best * 1e3 / count;
}

// Bytes that a decode launch must move for a sequence at row t; the kernel's own count.
double DecodeBytes(int t) {
  const int r = t / 16;
  const int i = t % 16;
  double bytes = kGdnImageBytes + 960 * t + 1024 * (r * (r + 1) / 2) + 64 * i * (1 + r) + 1216 + 960 + 512;
  bytes += 960 + 12 + 64 * (1 + 2 * r) + 384;
  if (t == kGdnChunk - 1) bytes += 2 * kGdnStateF32Bytes + 2 * kGdnImageBytes + 64 * 15 * 3;
  return bytes * kHeads;
}

const DevicePiece* DecodePieces(const std::vector<int>& rows) {
  std::vector<DevicePiece> pieces;
  for (int b = 0; b < static_cast<int>(rows.size()); ++b) {
    pieces.push_back({.row_begin = b, .row_count = 1, .position = 6400 + rows[b], .slot = b});
  }
  return ToDevice(pieces);
}

void Decode() {
  for (const int batch : {1, 32, 128, 256}) {
    GdnParams params = MakeLayer(batch, batch);
    params.batch.piece_count = batch;
    params.batch.decode_pieces = batch;
    const auto time = [&](const std::vector<std::vector<int>>& steps) {
      std::vector<const DevicePiece*> pieces;
      double bytes = 0;
      for (const std::vector<int>& rows : steps) {
        pieces.push_back(DecodePieces(rows));
        for (const int t : rows) bytes += DecodeBytes(t) / static_cast<double>(steps.size());
      }
      const double us = Time(static_cast<int>(steps.size()), [&](int i, cudaStream_t stream) {
        params.batch.pieces = pieces[i];
        Check(LaunchGdnDecode(params, stream));
      });
      std::printf(" %.1f us (%.2f TB/s)", us, bytes / us / 1e6);
    };
    std::vector<std::vector<int>> mixed(kGdnChunk);
    for (int s = 0; s < kGdnChunk; ++s) {
      for (int b = 0; b < batch; ++b) mixed[s].push_back((b * 37 + 11 + s) % kGdnChunk);
    }
    std::printf("decode batch %d, each at its own row:", batch);
    time(mixed);
    for (const int t : {0, 16, 31, 47, 62, 63}) {
      std::printf("; all at %d:", t);
      time(std::vector<std::vector<int>>(8, std::vector<int>(batch, t)));
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

// Each sequence at its own row. The norm reads and writes a row of each head: 6 bytes an element apart, 2 together.
void Norm() {
  for (const int batch : {1, 8, 32, 128, 256}) {
    GdnParams params = MakeLayer(batch, batch);
    params.batch.piece_count = batch;
    params.batch.decode_pieces = batch;
    std::vector<const DevicePiece*> pieces;
    for (int s = 0; s < kGdnChunk; ++s) {
      std::vector<int> rows;
      for (int b = 0; b < batch; ++b) rows.push_back((b * 37 + 11 + s) % kGdnChunk);
      pieces.push_back(DecodePieces(rows));
    }
    const auto* gate = reinterpret_cast<const __nv_bfloat16*>(
        ToDevice(std::vector<uint16_t>(static_cast<size_t>(batch) * params.out_stride, F32ToBf16(0.7f))));
    const float* weight = ToDevice(std::vector<float>(kGdnValueDim, 1.0f));
    std::printf("decode batch %d:", batch);
    for (const GatedNormCasts casts : {GatedNormCasts::kThree, GatedNormCasts::kTwo, GatedNormCasts::kOne}) {
      const GdnOutputNorm norm = {
          .gate = gate, .weight = weight, .gate_stride = params.out_stride, .eps = 1e-5f, .casts = casts};
      const GatedRmsNormParams apart = {.x = params.out,
                                        .gate = gate,
                                        .weight = weight,
                                        .out = params.out,
                                        .rows = batch,
                                        .heads = kHeads,
                                        .head_dim = kGdnValueDim,
                                        .x_stride = params.out_stride,
                                        .gate_stride = params.out_stride,
                                        .out_stride = params.out_stride,
                                        .eps = norm.eps,
                                        .casts = casts};
      const double two = Time(kGdnChunk, [&](int i, cudaStream_t stream) {
        params.batch.pieces = pieces[i];
        Check(LaunchGdnDecode(params, stream));
        Check(LaunchGatedRmsNorm(apart, stream));
      });
      const double one = Time(kGdnChunk, [&](int i, cudaStream_t stream) {
        params.batch.pieces = pieces[i];
        Check(LaunchGdnDecodeNorm(params, norm, stream));
      });
      constexpr const char* kNames[] = {"three", "two", "one"};
      std::printf(" %s roundings: %.1f us in two launches, %.1f us in one;", kNames[static_cast<int>(casts)], two, one);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

void Prefill() {
  for (const auto& [sequences, length] : {std::pair{1, 8192}, {4, 2048}, {16, 512}, {1, 1024}, {1, 512}, {1, 64}}) {
    const int rows = sequences * length;
    GdnParams params = MakeLayer(rows, sequences);
    std::vector<DevicePiece> pieces;
    std::vector<DeviceTile> tiles;
    for (int s = 0; s < sequences; ++s) {
      pieces.push_back({.row_begin = s * length, .row_count = length, .position = 0, .slot = s});
      for (int position = 0; position < length; position += kGdnChunk) {
        tiles.push_back({.piece = s, .row_begin = s * length + position, .row_count = kGdnChunk, .position = position});
      }
    }
    params.batch.pieces = ToDevice(pieces);
    params.batch.tiles = ToDevice(tiles);
    params.batch.piece_count = sequences;
    params.batch.tile_count = static_cast<int32_t>(tiles.size());
    GdnPrefillParams prefill = {
        .gdn = params, .workspace = nullptr, .workspace_bytes = GdnPrefillWorkspaceBytes(kHeads, tiles.size())};
    Check(cudaMalloc(&prefill.workspace, prefill.workspace_bytes));
    const double us = Time(4, [&](int, cudaStream_t stream) { Check(LaunchGdnPrefill(prefill, stream)); });
    std::printf("prefill %d x %d: %.1f us, %.4f us a token\n", sequences, length, us, us / rows);
    std::fflush(stdout);
  }
}

void Once(int batch, int t) {
  GdnParams params = MakeLayer(batch, batch);
  params.batch.piece_count = batch;
  params.batch.decode_pieces = batch;
  params.batch.pieces = DecodePieces(std::vector<int>(batch, t));
  for (int i = 0; i < 3; ++i) Check(LaunchGdnDecode(params, nullptr));
  Check(cudaDeviceSynchronize());
  std::printf("counted: %.0f bytes\n", DecodeBytes(t) * batch);
}

}  // namespace
}  // namespace lockstep::cuda

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "decode") {
    lockstep::cuda::Decode();
  } else if (mode == "norm") {
    lockstep::cuda::Norm();
  } else if (mode == "prefill") {
    lockstep::cuda::Prefill();
  } else if (mode == "once" && argc == 4) {
    lockstep::cuda::Once(std::atoi(argv[2]), std::atoi(argv[3]));
  } else {
    std::fprintf(stderr, "usage: gdn_bench decode | norm | prefill | once BATCH T\n");
    return 2;
  }
  return 0;
}

// The row-wise operations for callers in other languages. Strides in elements; bf16 unless said.
#include <cstdint>

#include "kernels/cuda/add.h"
#include "kernels/cuda/c_api.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_rms_norm.h"
#include "kernels/cuda/gather_rows.h"
#include "kernels/cuda/gdn_conv.h"
#include "kernels/cuda/gdn_gates.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/round_rows.h"
#include "kernels/cuda/swiglu.h"

namespace {

using namespace lockstep::cuda;  // NOLINT(google-build-using-namespace): this file only maps arguments to it

const __nv_bfloat16* In(const void* pointer) {
  return static_cast<const __nv_bfloat16*>(pointer);
}

__nv_bfloat16* Out(void* pointer) {
  return static_cast<__nv_bfloat16*>(pointer);
}

lockstep::DType Type(int fp32) {
  return fp32 != 0 ? lockstep::DType::kF32 : lockstep::DType::kBF16;
}

cudaStream_t Stream(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

RmsNormParams NormParams(const void* x, const void* weight, void* out, int64_t rows, int64_t width, int64_t x_stride,
                         int64_t out_stride, float eps) {
  return {.x = x,
          .weight = weight,
          .out = Out(out),
          .rows = rows,
          .width = width,
          .x_stride = x_stride,
          .out_stride = out_stride,
          .eps = eps};
}

}  // namespace

extern "C" int lockstep_add(const void* x, void* residual, int64_t rows, int64_t width, int64_t x_stride,
                            int64_t residual_stride, int residual_fp32, void* stream) {
  const AddParams params = {.x = In(x),
                            .residual = residual,
                            .rows = rows,
                            .width = width,
                            .x_stride = x_stride,
                            .residual_stride = residual_stride,
                            .residual_dtype = Type(residual_fp32)};
  return CApiResult(LaunchAdd(params, Stream(stream)));
}

extern "C" int lockstep_embedding(const int32_t* tokens, const void* table, void* out, int64_t rows, int64_t vocab,
                                  int64_t hidden, int64_t out_stride, int table_fp32, int out_fp32, void* stream) {
  const EmbeddingParams params = {.tokens = tokens,
                                  .table = table,
                                  .out = out,
                                  .rows = rows,
                                  .vocab = vocab,
                                  .hidden = hidden,
                                  .out_stride = out_stride,
                                  .table_dtype = Type(table_fp32),
                                  .out_dtype = Type(out_fp32)};
  return CApiResult(LaunchEmbedding(params, Stream(stream)));
}

extern "C" int lockstep_gather_rows(const int32_t* indices, const void* in, void* out, int64_t rows, int64_t in_rows,
                                    int64_t width, int64_t in_stride, int64_t out_stride, int fp32, void* stream) {
  const GatherRowsParams params = {.indices = indices,
                                   .in = in,
                                   .out = out,
                                   .rows = rows,
                                   .in_rows = in_rows,
                                   .width = width,
                                   .in_stride = in_stride,
                                   .out_stride = out_stride,
                                   .dtype = Type(fp32)};
  return CApiResult(LaunchGatherRows(params, Stream(stream)));
}

// x: fp32, out: bf16.
extern "C" int lockstep_round_rows(const float* x, void* out, int64_t rows, int64_t width, int64_t x_stride,
                                   int64_t out_stride, void* stream) {
  const RoundRowsParams params = {
      .x = x, .out = Out(out), .rows = rows, .width = width, .x_stride = x_stride, .out_stride = out_stride};
  return CApiResult(LaunchRoundRows(params, Stream(stream)));
}

extern "C" int lockstep_swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int64_t gate_up_stride,
                               int64_t out_stride, void* stream) {
  const SwiGluParams params = {.gate_up = In(gate_up),
                               .out = Out(out),
                               .rows = rows,
                               .width = width,
                               .gate_up_stride = gate_up_stride,
                               .out_stride = out_stride};
  return CApiResult(LaunchSwiGlu(params, Stream(stream)));
}

// x_rows: int32 [rows], or null for rows 0, 1, ...
extern "C" int lockstep_rms_norm(const void* x, const int32_t* x_rows, const void* weight, void* out, int64_t rows,
                                 int64_t width, int64_t x_stride, int64_t out_stride, float eps, int x_fp32,
                                 int weight_fp32, void* stream) {
  RmsNormParams params = NormParams(x, weight, out, rows, width, x_stride, out_stride, eps);
  params.x_rows = x_rows;
  params.x_dtype = Type(x_fp32);
  params.weight_dtype = Type(weight_fp32);
  return CApiResult(LaunchRmsNorm(params, Stream(stream)));
}

// Both norms of `rows` rows, in place.
extern "C" int lockstep_rms_norm_pair(void* x0, const void* weight0, int64_t width0, int64_t stride0, void* x1,
                                      const void* weight1, int64_t width1, int64_t stride1, int64_t rows, float eps,
                                      void* stream) {
  return CApiResult(LaunchRmsNormPair(NormParams(x0, weight0, x0, rows, width0, stride0, stride0, eps),
                                      NormParams(x1, weight1, x1, rows, width1, stride1, stride1, eps),
                                      Stream(stream)));
}

// fusion: 1 residual += x, out = norm(residual); 2 residual += norm(x), out null; 3 that, then out = norm(residual)
// with out_weight (else null). fp32: of weight and residual. Rows side by side.
extern "C" int lockstep_rms_norm_residual(int fusion, const void* x, const void* weight, const void* out_weight,
                                          void* residual, void* out, int64_t rows, int64_t width, float eps, int fp32,
                                          void* stream) {
  const RmsNormParams params = {.fusion = static_cast<RmsNormFusion>(fusion),
                                .x = x,
                                .weight = weight,
                                .out_weight = out_weight,
                                .residual = residual,
                                .out = Out(out),
                                .rows = rows,
                                .width = width,
                                .x_stride = width,
                                .residual_stride = width,
                                .out_stride = out == nullptr ? 0 : width,
                                .eps = eps,
                                .weight_dtype = Type(fp32),
                                .residual_dtype = Type(fp32)};
  return CApiResult(LaunchRmsNorm(params, Stream(stream)));
}

// casts: 1: one rounding; 2: two, and an fp32 weight; else three.
extern "C" int lockstep_gated_rms_norm(const void* x, const void* gate, const void* weight, void* out, int64_t rows,
                                       int64_t heads, int64_t head_dim, int64_t x_stride, int64_t gate_stride,
                                       int64_t out_stride, float eps, int casts, void* stream) {
  const GatedRmsNormParams params = {
      .x = In(x),
      .gate = In(gate),
      .weight = weight,
      .out = Out(out),
      .rows = rows,
      .heads = heads,
      .head_dim = head_dim,
      .x_stride = x_stride,
      .gate_stride = gate_stride,
      .out_stride = out_stride,
      .eps = eps,
      .casts = casts == 1 ? lockstep::GatedNormCasts::kOne
                          : (casts == 2 ? lockstep::GatedNormCasts::kTwo : lockstep::GatedNormCasts::kThree)};
  return CApiResult(LaunchGatedRmsNorm(params, Stream(stream)));
}

extern "C" int lockstep_gdn_gates(const void* a, const void* b, const float* a_log, const float* dt_bias, void* beta,
                                  float* g, int64_t rows, int64_t heads, int64_t a_stride, int64_t b_stride,
                                  int64_t beta_stride, int64_t g_stride, int neg_eigval, void* stream) {
  const GdnGatesParams params = {.a = In(a),
                                 .b = In(b),
                                 .a_log = a_log,
                                 .dt_bias = dt_bias,
                                 .beta = Out(beta),
                                 .g = g,
                                 .rows = rows,
                                 .heads = heads,
                                 .a_stride = a_stride,
                                 .b_stride = b_stride,
                                 .beta_stride = beta_stride,
                                 .g_stride = g_stride,
                                 .neg_eigval = neg_eigval != 0};
  return CApiResult(LaunchGdnGates(params, Stream(stream)));
}

// pieces: DevicePiece [piece_count]; tiles: DeviceTile [tile_count]; tail: as GdnConvParams, slot_stride in bytes.
extern "C" int lockstep_gdn_conv(const void* in, const void* weight, void* out, void* tail, int64_t slot_stride,
                                 int64_t in_stride, int64_t out_stride, int64_t key_heads, int64_t key_dim,
                                 int64_t value_width, int one_cast, const void* pieces, const void* tiles, int32_t rows,
                                 int32_t piece_count, int32_t decode_pieces, int32_t tile_count, void* stream) {
  const GdnConvParams params = {.in = In(in),
                                .weight = In(weight),
                                .out = Out(out),
                                .tail = tail,
                                .slot_stride = slot_stride,
                                .in_stride = in_stride,
                                .out_stride = out_stride,
                                .key_heads = key_heads,
                                .key_dim = key_dim,
                                .value_width = value_width,
                                .casts = one_cast != 0 ? lockstep::ConvCasts::kOne : lockstep::ConvCasts::kTwo,
                                .batch = {.pieces = static_cast<const DevicePiece*>(pieces),
                                          .tiles = static_cast<const DeviceTile*>(tiles),
                                          .rows = rows,
                                          .piece_count = piece_count,
                                          .decode_pieces = decode_pieces,
                                          .tile_count = tile_count}};
  return CApiResult(LaunchGdnConv(params, Stream(stream)));
}

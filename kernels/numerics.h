// NumericsProfile: where a trainer casts, as data. A worker runs one profile; nothing else in the code knows a trainer.
// docs/numerics.md says what each operation computes; this struct holds the choices that differ between trainers.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"

namespace lockstep {

enum class DType : uint8_t { kF32, kBF16, kF16 };

constexpr int64_t DTypeBytes(DType t) {
  return t == DType::kF32 ? 4 : 2;
}
std::string_view DTypeName(DType t);  // "float32", "bfloat16", "float16"

// Which arithmetic the chunk program of Gated DeltaNet uses.
enum class GdnProgram : uint8_t {
  // flash-linear-attention's chunk_gated_delta_rule: q and k normalised to bf16; inverse T kept in fp32 and used as
  // bf16; u, w, v' and the state's
  // image rounded to bf16 where they enter a product; exp2 of G * log2(e).
  kChunkBf16,
  // transformers' PyTorch fallback (torch_chunk_gated_delta_rule): everything between the bf16 inputs and the output is
  // fp32; exp.
  kChunkFp32,
};

// Order of a linear layer's sums.
enum class LinearProgram : uint8_t {
  kAscending,  // one chain of fused multiply-adds over ascending k
  // PyTorch's bf16 linear on CPUs with AVX512-BF16 (oneDNN): pairs of k, the odd one first, so k runs 1, 0, 3, 2, ...;
  // blocks of 512, or of 1,024 where there are more than 1,024 inputs, each a chain from zero, summed in order.
  // Subnormals count as zero.
  kTorchCpuPairs,
};

// Order of a norm's sum of squares.
enum class SquareSum : uint8_t {
  kLanes16,   // 16 lanes by fused multiply-add, then a tree
  kTorchCpu,  // PyTorch's sum on x86-64 CPUs, of rounded squares: 4 accumulators of 8 lanes, joined in order
};

// Tile order of attention's online softmax. Tiles are counted from absolute position 0.
enum class AttentionProgram : uint8_t {
  kTiles128Forward,  // cuDNN: 128-key tiles, from key 0 forwards
  kTiles512Forward,  // PyTorch's flash attention for CPUs: 512-key tiles, from key 0 forwards
  // cuDNN when it is given a mask: kTiles128Forward with scale and log2(e) as two products. On a CPU the same as that.
  kTiles128ForwardMask,
  kTiles64Backward,  // FlashAttention-2: 64-key tiles, from the diagonal backwards
};

// The exponential of attention's softmax numerators.
enum class AttentionExp : uint8_t {
  kExact,     // within 1 ulp
  kTorchCpu,  // what PyTorch's flash attention for CPUs takes for bf16: a cubic, within 1.1e-4, of AVX-512 builds
};

// The three-operation tail of the gated output norm: normalise, times weight, times silu(gate).
enum class GatedNormCasts : uint8_t {
  kThree,  // each product rounded to the activation dtype (transformers with bf16 weights)
  kTwo,    // normalised rounded, then the two products once: an fp32 weight promotes the first (transformers, autocast)
  kOne,    // rounded once at the end (fla's fused norm)
};

enum class ConvCasts : uint8_t {
  kTwo,  // sum of products rounded, then silu rounded (PyTorch)
  kOne,  // rounded once, after silu (causal-conv1d, fla)
};

struct NumericsProfile {
  std::string_view name;
  std::string_view description;

  DType weights;       // matrices as they are multiplied, convolutions' weights
  DType embedding;     // the embedding's table; a row of it is rounded to `residual`
  DType norm_weights;  // of all norms; dt_bias too
  DType a_log;         // A_log, before it is taken to fp32
  DType activations;   // what every operation's output is rounded to but the residual's; kF32: no rounding
  DType residual;      // the residual stream: what its sums are rounded to. A linear layer takes it rounded to
                       // `activations`
  DType kv;            // cached keys and values
  LinearProgram linear;
  SquareSum square_sum;  // RMSNorm, gated norm, l2norm
  GdnProgram gdn;
  ConvCasts conv;
  GatedNormCasts gated_norm;
  AttentionProgram attention;
  AttentionProgram sliding_attention;  // of layers with a window
  AttentionExp attention_exp;
  DType attention_p;  // softmax numerators as they enter P.V
  DType logits;       // what logits are rounded to before log_softmax in fp32

  // Trainer and library versions whose results this profile was checked against, and how ("tolerance" or "bits");
  // empty: not checked.
  std::string_view verified_against;
};

// All presets: "hf", "hf-masked", "hf-flash", "hf-autocast", "hf-autocast-masked", "hf-torch", "olmo-core", "fp32".
std::span<const NumericsProfile> NumericsProfiles();
// NOT_FOUND lists the known names.
absl::StatusOr<NumericsProfile> FindNumericsProfile(std::string_view name);

}  // namespace lockstep

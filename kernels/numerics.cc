#include "kernels/numerics.h"

#include <array>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

// What transformers computes on a GPU in bf16, with fla's kernels and PyTorch's own attention.
constexpr NumericsProfile kHf = {
    .name = "hf",
    .description = "transformers with flash-linear-attention's kernels on a GPU, bf16",
    .weights = DType::kBF16,
    .embedding = DType::kBF16,
    .norm_weights = DType::kBF16,
    .a_log = DType::kF32,
    .activations = DType::kBF16,
    .residual = DType::kBF16,
    .kv = DType::kBF16,
    .linear = LinearProgram::kAscending,
    .square_sum = SquareSum::kLanes16,
    .gdn = GdnProgram::kChunkBf16,
    .conv = ConvCasts::kTwo,
    .gated_norm = GatedNormCasts::kThree,
    .attention = AttentionProgram::kTiles128Forward,
    .sliding_attention = AttentionProgram::kTiles128Forward,
    .attention_exp = AttentionExp::kExact,
    .attention_p = DType::kBF16,
    .logits = DType::kBF16,
    .verified_against =
        "on CUDA: transformers 5.17.0, flash-linear-attention 0.5.2, torch 2.11.0 (cuDNN 9.19), H200: bits",
};

// What transformers runs in layers with a window once a forward is as long as that.
constexpr NumericsProfile Masked(NumericsProfile p, std::string_view name, std::string_view description) {
  p.name = name;
  p.description = description;
  p.sliding_attention = AttentionProgram::kTiles128ForwardMask;
  return p;
}

constexpr NumericsProfile HfFlash() {
  NumericsProfile p = kHf;
  p.name = "hf-flash";
  p.description = "hf with attn_implementation flash: PyTorch's flash backend of attention instead of cuDNN's";
  p.attention = p.sliding_attention = AttentionProgram::kTiles64Backward;
  return p;
}

constexpr NumericsProfile HfAutocast() {
  NumericsProfile p = kHf;
  p.name = "hf-autocast";
  p.description = "hf with fp32 weights under torch.autocast to bf16: fp32 residual stream, embedding and norm weights";
  p.embedding = p.norm_weights = p.residual = DType::kF32;
  p.gated_norm = GatedNormCasts::kTwo;
  return p;
}

constexpr NumericsProfile HfTorch() {
  NumericsProfile p = kHf;
  p.name = "hf-torch";
  p.description = "transformers with its PyTorch fallback of the GDN kernels on a CPU, bf16";
  p.linear = LinearProgram::kTorchCpuPairs;
  p.square_sum = SquareSum::kTorchCpu;
  p.gdn = GdnProgram::kChunkFp32;
  p.attention = p.sliding_attention = AttentionProgram::kTiles512Forward;
  p.attention_exp = AttentionExp::kTorchCpu;
  p.verified_against =
      "transformers 5.17.0, torch 2.13.0 (CPU with AVX512-BF16): operations in bits, models by tolerance";
  return p;
}

// Under FSDP every parameter is gathered in bf16, A_log too.
constexpr NumericsProfile OlmoCore() {
  NumericsProfile p = kHf;
  p.name = "olmo-core";
  p.description =
      "OLMo-core's modules, not compiled, under FSDP in bf16, with fla and flash-attn 2; read from source, unverified";
  p.a_log = DType::kBF16;
  p.conv = ConvCasts::kOne;
  p.gated_norm = GatedNormCasts::kOne;
  p.attention = p.sliding_attention = AttentionProgram::kTiles64Backward;
  p.verified_against = "";
  return p;
}

constexpr NumericsProfile Fp32() {
  NumericsProfile p = HfTorch();
  p.name = "fp32";
  p.description = "the same programs with no rounding between operations";
  p.weights = p.embedding = p.norm_weights = p.activations = p.residual = p.kv = DType::kF32;
  p.linear = LinearProgram::kAscending;
  p.attention_exp = AttentionExp::kExact;
  p.attention_p = p.logits = DType::kF32;
  p.verified_against = "transformers 5.17.0, torch 2.13.0 (CPU): tolerance";
  return p;
}

constexpr std::array kProfiles = {
    kHf,
    Masked(kHf, "hf-masked", "hf of forwards as long as the window: layers with one run cuDNN's program for a mask"),
    HfFlash(),
    HfAutocast(),
    Masked(HfAutocast(), "hf-autocast-masked", "hf-autocast of forwards as long as the window, as hf-masked"),
    HfTorch(),
    OlmoCore(),
    Fp32()};

}  // namespace

std::string_view DTypeName(DType t) {
  switch (t) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
  }
  return "unknown";
}

std::span<const NumericsProfile> NumericsProfiles() {
  return kProfiles;
}

absl::StatusOr<NumericsProfile> FindNumericsProfile(std::string_view name) {
  std::string known;
  for (const NumericsProfile& profile : kProfiles) {
    if (profile.name == name) return profile;
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(profile.name));
  }
  return absl::NotFoundError(absl::StrCat("numerics profile '", std::string(name), "' is not known; known: ", known));
}

}  // namespace lockstep

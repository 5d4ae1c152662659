#include "kernels/numerics.h"

#include <array>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr std::array<NumericsProfile, 4> kProfiles = {{
    {
        .name = "hf",
        .description = "transformers with flash-linear-attention's kernels on a GPU, bf16",
        .weights = DType::kBF16,
        .activations = DType::kBF16,
        .kv = DType::kBF16,
        .linear = LinearProgram::kAscending,
        .square_sum = SquareSum::kLanes16,
        .gdn = GdnProgram::kChunkBf16,
        .conv = ConvCasts::kTwo,
        .gated_norm = GatedNormCasts::kThree,
        .attention = AttentionProgram::kTiles128Forward,
        .attention_exp = AttentionExp::kExact,
        .attention_p = DType::kBF16,
        .logits = DType::kBF16,
        .verified_against =
            "on CUDA: transformers 5.17.0, flash-linear-attention 0.5.2, torch 2.11.0 (cuDNN 9.19), H200: bits",
    },
    {
        .name = "hf-flash",
        .description = "hf with attn_implementation flash: PyTorch's flash backend of attention instead of cuDNN's",
        .weights = DType::kBF16,
        .activations = DType::kBF16,
        .kv = DType::kBF16,
        .linear = LinearProgram::kAscending,
        .square_sum = SquareSum::kLanes16,
        .gdn = GdnProgram::kChunkBf16,
        .conv = ConvCasts::kTwo,
        .gated_norm = GatedNormCasts::kThree,
        .attention = AttentionProgram::kTiles64Backward,
        .attention_exp = AttentionExp::kExact,
        .attention_p = DType::kBF16,
        .logits = DType::kBF16,
        .verified_against = "",
    },
    {
        .name = "hf-torch",
        .description = "transformers with its PyTorch fallback of the GDN kernels on a CPU, bf16",
        .weights = DType::kBF16,
        .activations = DType::kBF16,
        .kv = DType::kBF16,
        .linear = LinearProgram::kTorchCpuPairs,
        .square_sum = SquareSum::kTorchCpu,
        .gdn = GdnProgram::kChunkFp32,
        .conv = ConvCasts::kTwo,
        .gated_norm = GatedNormCasts::kThree,
        .attention = AttentionProgram::kTiles512Forward,
        .attention_exp = AttentionExp::kTorchCpu,
        .attention_p = DType::kBF16,
        .logits = DType::kBF16,
        .verified_against =
            "transformers 5.17.0, torch 2.13.0 (CPU with AVX512-BF16): operations in bits, models by tolerance",
    },
    {
        .name = "fp32",
        .description = "the same programs with no rounding between operations",
        .weights = DType::kF32,
        .activations = DType::kF32,
        .kv = DType::kF32,
        .linear = LinearProgram::kAscending,
        .square_sum = SquareSum::kTorchCpu,
        .gdn = GdnProgram::kChunkFp32,
        .conv = ConvCasts::kTwo,
        .gated_norm = GatedNormCasts::kThree,
        .attention = AttentionProgram::kTiles512Forward,
        .attention_exp = AttentionExp::kExact,
        .attention_p = DType::kF32,
        .logits = DType::kF32,
        .verified_against = "transformers 5.17.0, torch 2.13.0 (CPU): tolerance",
    },
}};

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

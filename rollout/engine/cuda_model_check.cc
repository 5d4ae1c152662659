#include "rollout/engine/cuda_model_check.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/gdn_conv.h"
#include "kernels/cuda/gdn_state.h"
#include "kernels/cuda/kv_cache.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/rms_norm.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

absl::Status Unlike(const char* field, int64_t seen, const std::string& wanted) {
  return absl::InvalidArgumentError(
      absl::StrCat("config.json ", field, ": value ", seen, " is not served by --backend cuda; want ", wanted));
}

absl::Status CheckIs(const char* field, int64_t seen, int64_t wanted) {
  return seen == wanted ? absl::OkStatus() : Unlike(field, seen, absl::StrCat(wanted));
}

absl::Status CheckNorm(const char* field, int64_t width) {
  if (width >= cuda::kMinRmsNormWidth && width <= cuda::kMaxRmsNormWidth) return absl::OkStatus();
  return Unlike(field, width, absl::StrCat(cuda::kMinRmsNormWidth, " to ", cuda::kMaxRmsNormWidth));
}

// Of the inputs of a linear layer.
absl::Status CheckInputs(const char* field, int64_t width) {
  if (width % cuda::kLinearInputMultiple == 0) return absl::OkStatus();
  return Unlike(field, width, absl::StrCat("a multiple of ", cuda::kLinearInputMultiple));
}

absl::Status CheckAttention(const AttentionShape& shape) {
  LOCKSTEP_RETURN_IF_ERROR(CheckIs("hidden_size / num_attention_heads", shape.head_dim, cuda::kKvHeadDim));
  LOCKSTEP_RETURN_IF_ERROR(CheckNorm("num_attention_heads * 128", shape.heads * shape.head_dim));
  return CheckNorm("num_key_value_heads * 128", shape.kv_heads * shape.head_dim);
}

absl::Status CheckGdn(const GdnShape& shape) {
  LOCKSTEP_RETURN_IF_ERROR(CheckIs("linear_key_head_dim", shape.key_dim, cuda::kGdnKeyDim));
  LOCKSTEP_RETURN_IF_ERROR(CheckIs("linear_value_head_dim", shape.value_dim, cuda::kGdnValueDim));
  return CheckIs("linear_conv_kernel_dim", shape.conv_width, cuda::kGdnConvWidth);
}

}  // namespace

absl::Status CheckCudaModel(const ModelSpec& spec) {
  LOCKSTEP_RETURN_IF_ERROR(CheckNorm("hidden_size", spec.hidden_size));
  LOCKSTEP_RETURN_IF_ERROR(CheckInputs("hidden_size", spec.hidden_size));
  LOCKSTEP_RETURN_IF_ERROR(CheckInputs("intermediate_size", spec.intermediate_size));
  for (const LayerSpec& layer : spec.layers) {
    LOCKSTEP_RETURN_IF_ERROR(layer.mixer == MixerKind::kGatedDeltaNet ? CheckGdn(layer.gdn)
                                                                      : CheckAttention(layer.attention));
  }
  return absl::OkStatus();
}

}  // namespace lockstep

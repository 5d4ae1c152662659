#include "rollout/server/info.h"

#include <string_view>

namespace lockstep {
namespace {

#if defined(__x86_64__)
constexpr std::string_view kCpuTarget = "x86_64";
#elif defined(__aarch64__)
constexpr std::string_view kCpuTarget = "aarch64";
#else
#error "unknown architecture"
#endif

#if defined(__clang__)
constexpr std::string_view kCompiler = "clang " __clang_version__;
#else
constexpr std::string_view kCompiler = "gcc " __VERSION__;
#endif

std::string Dtype(DType dtype) {
  return std::string(DTypeName(dtype));
}

const char* AttentionName(AttentionProgram program) {
  switch (program) {
    case AttentionProgram::kTiles128Forward:
      return "tiles128_forward";
    case AttentionProgram::kTiles128ForwardMask:
      return "tiles128_forward_mask";
    case AttentionProgram::kTiles512Forward:
      return "tiles512_forward";
    case AttentionProgram::kTiles64Backward:
      return "tiles64_backward";
  }
  return "";
}

const char* GatedNormName(GatedNormCasts casts) {
  switch (casts) {
    case GatedNormCasts::kThree:
      return "three";
    case GatedNormCasts::kTwo:
      return "two";
    case GatedNormCasts::kOne:
      return "one";
  }
  return "";
}

void FillNumerics(const NumericsProfile& profile, v1::NumericsInfo* out) {
  out->set_profile(std::string(profile.name));
  out->set_description(std::string(profile.description));
  out->set_weights_dtype(Dtype(profile.weights));
  out->set_embedding_dtype(Dtype(profile.embedding));
  out->set_norm_weights_dtype(Dtype(profile.norm_weights));
  out->set_a_log_dtype(Dtype(profile.a_log));
  out->set_residual_dtype(Dtype(profile.residual));
  out->set_activations_dtype(Dtype(profile.activations));
  out->set_kv_dtype(Dtype(profile.kv));
  out->set_linear_program(profile.linear == LinearProgram::kAscending ? "ascending" : "torch_cpu_pairs");
  out->set_square_sum(profile.square_sum == SquareSum::kLanes16 ? "lanes16" : "torch_cpu");
  out->set_gdn_program(profile.gdn == GdnProgram::kChunkBf16 ? "chunk_bf16" : "chunk_fp32");
  out->set_conv_casts(profile.conv == ConvCasts::kTwo ? "two" : "one");
  out->set_gated_norm_casts(GatedNormName(profile.gated_norm));
  out->set_attention_program(AttentionName(profile.attention));
  out->set_sliding_attention_program(AttentionName(profile.sliding_attention));
  out->set_attention_exp(profile.attention_exp == AttentionExp::kTorchCpu ? "torch_cpu" : "exact");
  out->set_attention_p_dtype(Dtype(profile.attention_p));
  out->set_logits_dtype(Dtype(profile.logits));
  out->set_verified_against(std::string(profile.verified_against));
}

void FillLimits(const RequestContext& context, v1::Limits* out) {
  const ServiceLimits& limits = context.limits;
  out->set_max_prompt_tokens(limits.max_prompt_tokens);
  out->set_max_sequence_tokens(context.max_sequence_tokens);
  out->set_max_n(limits.max_n);
  out->set_max_top_logprobs(kMaxTopLogprobs);
  out->set_max_request_bytes(limits.max_request_bytes);
  out->set_max_response_bytes(kMaxResponseBytes);
  out->set_max_waiting_sequences(limits.max_waiting_sequences);
  out->set_max_buffered_bytes(limits.max_buffered_bytes);
  out->set_max_retained_bytes(limits.max_retained_bytes);
  out->set_reattach_ms(absl::ToInt64Milliseconds(limits.reattach));
  out->set_max_version_wait_ms(absl::ToInt64Milliseconds(limits.max_version_wait));
  out->set_max_stop_token_ids(kMaxStopTokenIds);
  out->set_max_stop_sequences(kMaxStopSequences);
  out->set_max_stop_sequence_tokens(kMaxStopSequenceTokens);
  out->set_max_stop_strings(kMaxStopStrings);
  out->set_max_stop_string_bytes(kMaxStopStringBytes);
  out->set_max_logit_bias(kMaxLogitBiasEntries);
  out->set_max_allowed_token_ids(kMaxAllowedTokenIds);
  out->set_max_bad_words(kMaxBadWords);
  out->set_max_bad_word_tokens(kMaxBadWordLength);
}

}  // namespace

void FillInfo(const ServingModel& model, const RequestContext& context, const std::string& backend,
              v1::GetInfoResponse* response) {
  v1::ModelInfo* out = response->mutable_model();
  out->set_name(model.name);
  out->set_type(model.spec.model_type);
  out->set_vocab_size(model.spec.vocab_size);
  out->set_hidden_size(model.spec.hidden_size);
  out->set_num_layers(static_cast<int64_t>(model.spec.layers.size()));
  out->set_max_position(model.spec.max_position);
  out->set_parameter_count(model.spec.parameter_count());
  out->mutable_eos_token_ids()->Assign(model.spec.eos_token_ids.begin(), model.spec.eos_token_ids.end());
  out->set_has_tokenizer(model.has_tokenizer);
  FillNumerics(model.profile, response->mutable_numerics());
  FillLimits(context, response->mutable_limits());
  response->set_weights_receive(ProtoReceive(model.weights_receive));
  v1::BuildInfo* build = response->mutable_build();
  build->set_version(LOCKSTEP_VERSION);
  build->set_commit(LOCKSTEP_COMMIT);
  build->set_compiler(std::string(kCompiler));
  build->set_cpu_target(std::string(kCpuTarget));
  build->set_backend(backend);
  build->set_device(model.device);
}

v1::WeightsReceive ProtoReceive(WeightsReceive receive) {
  switch (receive) {
    case WeightsReceive::kOff:
      return v1::WEIGHTS_RECEIVE_OFF;
    case WeightsReceive::kStaged:
      return v1::WEIGHTS_RECEIVE_STAGED;
    case WeightsReceive::kDirect:
      return v1::WEIGHTS_RECEIVE_DIRECT;
  }
  return v1::WEIGHTS_RECEIVE_UNSPECIFIED;
}

std::string VersionLine() {
  std::string line = "lockstep-worker " LOCKSTEP_VERSION " (";
  if (std::string_view(LOCKSTEP_COMMIT).size() > 0) line += "commit " LOCKSTEP_COMMIT ", ";
  return line + std::string(kCompiler) + ", " + std::string(kCpuTarget) + ")";
}

}  // namespace lockstep

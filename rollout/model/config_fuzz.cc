// libFuzzer: any bytes as config.json, optionally a zero byte and generation_config.json after it; or, if they begin
// with 'T', as tokenizer.json. What passes must be a spec that the rest of the program can compute with.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "rollout/base/check.h"
#include "rollout/model/name_map.h"
#include "rollout/model/spec.h"
#include "rollout/model/tokenizer.h"

namespace {

void CheckSpec(const lockstep::ModelSpec& spec) {
  LOCKSTEP_CHECK(spec.vocab_size > 0 && spec.hidden_size > 0 && !spec.layers.empty() && spec.max_position > 0, "sizes");
  LOCKSTEP_CHECK(std::isfinite(spec.norm_eps) && spec.norm_eps > 0, "norm_eps {}", spec.norm_eps);
  for (const lockstep::LayerSpec& layer : spec.layers) {
    if (layer.mixer == lockstep::MixerKind::kGatedDeltaNet) {
      LOCKSTEP_CHECK(layer.gdn.key_heads > 0 && layer.gdn.value_heads % layer.gdn.key_heads == 0, "GDN heads");
      LOCKSTEP_CHECK(layer.gdn.key_dim > 0 && layer.gdn.value_dim > 0 && layer.gdn.conv_width >= 2, "GDN sizes");
      continue;
    }
    LOCKSTEP_CHECK(layer.attention.heads > 0 && layer.attention.heads % layer.attention.kv_heads == 0, "heads");
    LOCKSTEP_CHECK((layer.mixer == lockstep::MixerKind::kSlidingAttention) == (layer.attention.window > 0), "window");
    if (!layer.rope.has_value()) continue;
    LOCKSTEP_CHECK(layer.rope->inv_freq.size() * 2 == static_cast<size_t>(layer.attention.head_dim), "rope size");
    LOCKSTEP_CHECK(std::isfinite(layer.rope->attention_scaling), "rope scaling");
    for (float f : layer.rope->inv_freq) LOCKSTEP_CHECK(std::isfinite(f) && f >= 0, "rope frequency {}", f);
  }
  for (int32_t id : spec.eos_token_ids) LOCKSTEP_CHECK(id >= 0 && id < spec.vocab_size, "eos {}", id);
  LOCKSTEP_CHECK(spec.parameter_count() > 0, "parameters");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (bytes.starts_with('T')) {
    if (const auto tokens = lockstep::TokenBytes::Parse(bytes.substr(1)); tokens.ok()) {
      for (int32_t id = 0; id < tokens->size(); ++id)
        LOCKSTEP_CHECK(tokens->bytes(id).size() <= size * 8, "token {}", id);
    }
    return 0;
  }
  const size_t zero = bytes.find('\0');
  const std::string_view generation = zero == std::string_view::npos ? std::string_view() : bytes.substr(zero + 1);
  if (const auto spec = lockstep::ParseModelSpec(bytes.substr(0, zero), generation); spec.ok()) CheckSpec(*spec);
  return 0;
}

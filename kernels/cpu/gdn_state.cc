#include "kernels/cpu/gdn_state.h"

#include "rollout/base/check.h"

namespace lockstep {
namespace {

constexpr int64_t kAlignment = 64;

int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out 64-byte aligned parts one after another.
class Parts {
 public:
  int64_t Add(int64_t bytes) {
    const int64_t begin = end_;
    end_ += RoundUp(bytes, kAlignment);
    return begin;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

}  // namespace

GdnStateLayout::GdnStateLayout(const NumericsProfile& profile, const GdnShape& shape) {
  LOCKSTEP_CHECK(shape.key_heads > 0 && shape.value_heads > 0 && shape.value_heads % shape.key_heads == 0,
                 "value heads must be a multiple of key heads: {} of {}", shape.value_heads, shape.key_heads);
  LOCKSTEP_CHECK(shape.key_dim > 0 && shape.value_dim > 0 && shape.conv_width > 0,
                 "key_dim {}, value_dim {}, conv_width {}", shape.key_dim, shape.value_dim, shape.conv_width);
  const bool bf16 = profile.gdn == GdnProgram::kChunkBf16;
  key_pitch = RoundUp(shape.key_dim, 16);
  value_pitch = RoundUp(shape.value_dim, 16);

  Parts head;
  state = head.Add(shape.key_dim * value_pitch * 4);
  decay = head.Add(kGdnChunk * 4);
  new_values = head.Add(kGdnChunk * value_pitch * 4);
  decay_sum = head.Add(bf16 ? 0 : sizeof(double));
  solved = head.Add(bf16 ? 0 : kGdnChunk * (value_pitch + key_pitch) * 4);
  state_image = head.Add(bf16 ? shape.key_dim * value_pitch * 2 : 0);
  inverse = head.Add(bf16 ? kGdnChunk * kGdnChunk * 4 : 0);
  beta_values = head.Add(bf16 ? kGdnChunk * value_pitch * 2 : 0);
  beta_keys = head.Add(bf16 ? kGdnChunk * key_pitch * 2 : 0);
  new_values_bf16 = head.Add(bf16 ? kGdnChunk * value_pitch * 2 : 0);
  value_head_bytes = head.end();

  Parts key_head;
  key_head.Add(kGdnChunk * shape.key_dim * (bf16 ? 2 : DTypeBytes(profile.activations)));
  key_factors = key_head.Add(bf16 ? 0 : kGdnChunk * 4);
  key_head_bytes = key_head.end();

  Parts slot;
  slot.Add(sizeof(GdnStateHeader));
  conv_row_bytes = shape.conv_channels() * DTypeBytes(profile.activations);
  conv_tail = slot.Add((shape.conv_width - 1) * conv_row_bytes);
  key_heads = slot.Add(shape.key_heads * key_head_bytes);
  value_heads = slot.Add(shape.value_heads * value_head_bytes);
  bytes = slot.end();
}

int64_t CpuGdnStateBytes(const CpuContext& ctx, const GdnShape& shape) {
  return GdnStateLayout(ctx.profile, shape).bytes;
}

void CpuGdnResetState(const CpuContext&, const GdnShape&, std::byte* state) {
  reinterpret_cast<GdnStateHeader*>(state)->tokens = 0;
}

}  // namespace lockstep

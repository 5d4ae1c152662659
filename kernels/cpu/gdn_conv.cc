// out[r][c] = silu(sum over taps i, oldest first, of weight[c][i] * in[r - width + 1 + i][c]): one fp32 product, then
// fused multiply-adds. Grid: blocks of channels, each over all pieces, so that a block's weights are transposed once.
// Traffic: in and out once.
#include "kernels/cpu/gdn_conv.h"

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/gdn_state.h"
#include "kernels/float_bits.h"
#include "rollout/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gdn_conv.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/row_matrix-inl.h"
#include "kernels/cpu/simd_util-inl.h"

#ifndef LOCKSTEP_KERNELS_CPU_GDN_CONV_ONCE_
#define LOCKSTEP_KERNELS_CPU_GDN_CONV_ONCE_
namespace lockstep {

constexpr int64_t kConvChannels = 512;  // of a block, at most
constexpr int64_t kMaxConvWidth = 16;

struct GdnConvBlock {
  Rows in;              // [rows of the piece, kConvChannels or fewer]
  Rows out;             // the same shape
  const float* weight;  // [width, kConvChannels]
  float* history;       // scratch, [width - 1, kConvChannels]: the rows before the piece, oldest first
  std::byte* tail;      // the state's tail at the block's first channel
  int64_t tail_stride;  // bytes
  int64_t width;        // taps
  int64_t position;     // of the piece's first row
  bool bf16;            // activations are bf16: the tail is stored so and results are rounded
  bool round_sum;       // round between sum and SiLU
};

}  // namespace lockstep
#endif

HWY_BEFORE_NAMESPACE();
namespace lockstep {
namespace HWY_NAMESPACE {
namespace {

// kTaps: the width, or 0 for the one in the block. x: the rows under the taps, oldest first.
template <bool kBf16, bool kRoundSum, int kTaps, class Load>
HWY_INLINE VF ConvolveVector(const GdnConvBlock& b, const float* const* x, int64_t c, Load load) {
  const DF df;
  VF sum = hn::Mul(load(x[0] + c), hn::Load(df, b.weight + c));
  const int taps = kTaps > 0 ? kTaps : static_cast<int>(b.width);
  HWY_UNROLL(4)
  for (int tap = 1; tap < taps; ++tap)
    sum = hn::MulAdd(load(x[tap] + c), hn::Load(df, b.weight + tap * kConvChannels + c), sum);
  return RoundIf<kBf16>(Silu(RoundIf<kRoundSum>(sum)));
}

template <bool kBf16, bool kRoundSum, int kTaps>
void Convolve(const GdnConvBlock& b) {
  const DF df;
  const int64_t history_rows = b.width - 1;
  const float* x[kMaxConvWidth];
  for (int64_t r = 0; r < b.in.rows; ++r) {
    for (int64_t tap = 0; tap < b.width; ++tap) {
      const int64_t row = r + tap - history_rows;
      x[tap] = row >= 0 ? b.in.row(row) : b.history + (row + history_rows) * kConvChannels;
    }
    float* out = b.out.row(r);
    int64_t c = 0;
    for (; c + static_cast<int64_t>(kLanes) <= b.in.width; c += kLanes) {
      hn::StoreU(ConvolveVector<kBf16, kRoundSum, kTaps>(b, x, c, [](const float* p) { return hn::LoadU(DF(), p); }),
                 df, out + c);
    }
    if (const int64_t left = b.in.width - c; left > 0) {
      StoreFirst(
          ConvolveVector<kBf16, kRoundSum, kTaps>(b, x, c, [left](const float* p) { return LoadFirst(p, left); }),
          out + c, left);
    }
  }
}

template <bool kBf16, bool kRoundSum>
void ConvolveAnyWidth(const GdnConvBlock& b) {
  (b.width == 4 ? Convolve<kBf16, kRoundSum, 4> : Convolve<kBf16, kRoundSum, 0>)(b);
}

// The tail's row of a position.
std::byte* TailRow(const GdnConvBlock& b, int64_t position) {
  return b.tail + position % (b.width - 1) * b.tail_stride;
}

void GdnConvBlockImpl(const GdnConvBlock& b) {
  const int64_t history_rows = b.width - 1;
  for (int64_t i = 0; i < history_rows; ++i) {
    float* to = b.history + i * kConvChannels;
    const int64_t position = b.position - history_rows + i;
    if (position < 0) {
      std::fill_n(to, b.in.width, 0.0f);
      continue;
    }
    const std::byte* from = TailRow(b, position);
    for (int64_t c = 0; c < b.in.width; ++c) {
      to[c] = b.bf16 ? Bf16ToF32(reinterpret_cast<const uint16_t*>(from)[c]) : reinterpret_cast<const float*>(from)[c];
    }
  }
  if (!b.bf16) {
    ConvolveAnyWidth<false, false>(b);
  } else if (b.round_sum) {
    ConvolveAnyWidth<true, true>(b);
  } else {
    ConvolveAnyWidth<true, false>(b);
  }
  for (int64_t r = std::max<int64_t>(0, b.in.rows - history_rows); r < b.in.rows; ++r) {
    std::byte* to = TailRow(b, b.position + r);
    const float* from = b.in.row(r);
    for (int64_t c = 0; c < b.in.width; ++c) {
      if (b.bf16) {
        reinterpret_cast<uint16_t*>(to)[c] = F32ToBf16(from[c]);
      } else {
        reinterpret_cast<float*>(to)[c] = from[c];
      }
    }
  }
}

}  // namespace
// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace lockstep
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lockstep {
HWY_EXPORT(GdnConvBlockImpl);

void CpuGdnConv(const CpuContext& ctx, Rows in, const float* weight, const GdnShape& shape,
                std::span<const Piece> pieces, Rows out) {
  const int64_t channels = shape.conv_channels();
  LOCKSTEP_CHECK(in.width == channels && out.width == channels, "in has {} columns and out {}, want {}", in.width,
                 out.width, channels);
  const GdnStateLayout layout(ctx.profile, shape);
  const bool bf16 = ctx.profile.activations == DType::kBF16;
  const int64_t width = shape.conv_width;
  LOCKSTEP_CHECK(width <= kMaxConvWidth, "conv_width {}, at most {} are supported", width, kMaxConvWidth);
  // Wide blocks read memory in long runs; a narrow layer is still spread over all threads.
  const int64_t wanted = channels / (4 * static_cast<int64_t>(ctx.threads.threads()));
  const int64_t block_channels = std::clamp<int64_t>(wanted / 64 * 64, 64, kConvChannels);
  const int64_t blocks = (channels + block_channels - 1) / block_channels;
  ctx.threads.ParallelFor(blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    float* taps = ctx.scratch.Floats(thread, (2 * width - 1) * kConvChannels);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_channels;
      const int64_t count = std::min(block_channels, channels - first);
      for (int64_t tap = 0; tap < width; ++tap) {
        for (int64_t c = 0; c < (count + 15) / 16 * 16; ++c)
          taps[tap * kConvChannels + c] = c < count ? weight[(first + c) * width + tap] : 0.0f;
      }
      for (const Piece& piece : pieces) {
        const GdnConvBlock item = {
            .in = in.slice(piece.row_begin, piece.row_count).columns(first, count),
            .out = out.slice(piece.row_begin, piece.row_count).columns(first, count),
            .weight = taps,
            .history = taps + width * kConvChannels,
            .tail = piece.gdn_state + layout.conv_tail + first * DTypeBytes(ctx.profile.activations),
            .tail_stride = layout.conv_row_bytes,
            .width = width,
            .position = piece.position,
            .bf16 = bf16,
            .round_sum = ctx.profile.conv == ConvCasts::kTwo};
        HWY_DYNAMIC_DISPATCH(GdnConvBlockImpl)(item);
      }
    }
  });
}

}  // namespace lockstep
#endif  // HWY_ONCE

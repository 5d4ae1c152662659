// Hopper's instructions on a CPU, as far as more than one kernel's header of them has them: those headers in
// instructions/ are made of these. Included after prelude.h.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/host_run/host_run.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/special_functions.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::cuda {

// An offset into the block's shared memory.
inline uint32_t SharedAddress(const void* pointer) {
  const auto shared = host_run::Shared();
  const int64_t offset = static_cast<const std::byte*>(pointer) - shared.data();
  host_run::Check(offset >= 0 && offset < static_cast<int64_t>(shared.size()), "an address outside of shared memory");
  return static_cast<uint32_t>(offset);
}

inline void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  host_run::InitBarrier(barrier, static_cast<int>(arrivals));
}
inline void BarrierInitFence() {}
inline void BarrierArriveExpectBytes(uint64_t* barrier, uint32_t bytes) {
  host_run::Arrive(barrier, bytes);
}
inline void BarrierWait(uint64_t* barrier, uint32_t parity) {
  host_run::WaitBarrier(barrier, parity);
}

inline void BulkCopy(const void* from, void* to, uint64_t* barrier, uint32_t bytes) {
  host_run::Check(bytes % 16 == 0, "a bulk copy of no multiple of 16 bytes");
  auto* to_bytes = static_cast<std::byte*>(to);
  host_run::CopyLater(to_bytes, bytes, barrier, [=] { std::memcpy(to_bytes, from, bytes); });
}

inline void BulkPrefetch(const void*, uint32_t bytes) {
  host_run::Check(bytes % 16 == 0, "a prefetch of no multiple of 16 bytes");
}

// Four matrices of 8 x 8: lane i gives the address of row i % 8 of matrix i / 8.
inline void LoadFourMatrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  std::array<uint32_t, 4> result;
  host_run::Collective(transposed ? "ldmatrix.trans" : "ldmatrix", &address, sizeof(address), &result, sizeof(result),
                       [&](const std::byte* in, std::byte* out) {
                         const auto element = [&](int matrix, int row, int column) {
                           uint32_t line;
                           std::memcpy(&line, in + host_run::kLaneBytes * (8 * matrix + row), sizeof(line));
                           host_run::Check(line % 16 == 0, "ldmatrix of a row at no multiple of 16 bytes");
                           uint16_t value;
                           std::memcpy(&value, &host_run::Shared()[line + 2 * column], sizeof(value));
                           return static_cast<uint32_t>(value);
                         };
                         for (int lane = 0; lane < 32; ++lane) {
                           const int g = lane / 4, q = 2 * (lane % 4);
                           std::array<uint32_t, 4> words;
                           for (int m = 0; m < 4; ++m) {
                             words[m] = transposed ? element(m, q, g) | element(m, q + 1, g) << 16
                                                   : element(m, g, q) | element(m, g, q + 1) << 16;
                           }
                           std::memcpy(out + host_run::kLaneBytes * lane, &words, sizeof(words));
                         }
                       });
  std::copy(result.begin(), result.end(), r);
}
inline void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  LoadFourMatrices(r, address, false);
}
inline void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address) {
  LoadFourMatrices(r, address, true);
}

// d += a b: a 16 rows, b 8 columns, of 8 words along the sum. kPacked: terms a word holds, 2 of bf16 or 1 of tf32,
// whose low bits `make` cuts.
template <int kPacked>
void MmaStep(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
             oracle::Factor (*make)(float)) {
  static_assert(kPacked == 1 || kPacked == 2);
  struct Lane {
    float d[4];
    uint32_t a[4], b[2];
  } lane;
  std::copy_n(d, 4, lane.d);
  std::copy_n(a, 4, lane.a);
  lane.b[0] = b0;
  lane.b[1] = b1;
  host_run::Collective(what, &lane, sizeof(lane), d, sizeof(d), [make](const std::byte* in, std::byte* out) {
    Lane lanes[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&lanes[i], in + host_run::kLaneBytes * i, sizeof(Lane));
    constexpr int kQuadTerms = 4 * kPacked;  // in one word of each of its lanes
    const auto term = [](uint32_t word, int k) {
      if constexpr (kPacked == 1) return std::bit_cast<float>(word);
      return Bf16ToF32(static_cast<uint16_t>(word >> 16 * (k % 2)));
    };
    const auto rows = oracle::FactorMatrix::Of(
        16, 2 * kQuadTerms,
        [&](int row, int k) {
          return term(lanes[row % 8 * 4 + k % kQuadTerms / kPacked].a[row / 8 + k / kQuadTerms * 2], k);
        },
        make);
    const auto columns = oracle::FactorMatrix::Of(
        8, 2 * kQuadTerms,
        [&](int column, int k) { return term(lanes[column * 4 + k % kQuadTerms / kPacked].b[k / kQuadTerms], k); },
        make);
    for (int i = 0; i < 32; ++i) {
      float sums[4];
      for (int j = 0; j < 4; ++j) {
        sums[j] = oracle::FusedStep(lanes[i].d[j], rows.Row(i / 4 + j / 2 * 8), columns.Row(i % 4 * 2 + j % 2));
      }
      std::memcpy(out + host_run::kLaneBytes * i, sums, sizeof(sums));
    }
  });
}

inline void Mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaStep<2>("mma", d, a, b0, b1, oracle::MakeFactor);
}

inline float Exp2(float x) {
  return oracle::Exp2Approx(x);
}

}  // namespace lockstep::cuda

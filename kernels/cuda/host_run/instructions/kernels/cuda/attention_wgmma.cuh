// The instructions of kernels/cuda/attention_wgmma.cuh on a CPU. A warp's part of a product, 16 rows, depends on no
// other warp's, but takes place when all four have issued theirs. A product runs when it is waited for; its output is
// NaN until then, and its operands, those in registers too, are what they are by then.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_wgmma_descriptor.cuh"
#include "kernels/cuda/host_run/host_run.h"
#include "kernels/float_bits.h"
#include "kernels/oracle/tensor_core.h"

namespace lockstep::cuda {

inline void WgmmaFence() {}
inline void WgmmaCommit() {
  host_run::CommitProducts();
}
template <int kPending>
void WgmmaWait() {
  host_run::AwaitProducts(kPending);
}
template <int kCount>
void KeepRegisters(float (&)[kCount]) {}
template <int kRegisters>
void ReleaseRegisters() {}
template <int kRegisters>
void ClaimRegisters() {}

// An operand in shared memory, as its descriptor has it.
class WgmmaOperand {
 public:
  explicit WgmmaOperand(uint64_t descriptor)
      : start_(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        plane_step_(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        atom_step_(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4),
        line_(descriptor >> 62 == static_cast<uint64_t>(WgmmaSwizzle::k128Bytes) ? 128 : 64) {}

  // The inner dimension runs along the lines, a line a row.
  float AlongLines(int row, int k) const { return At(row / 8 * atom_step_ + row % 8 * line_ + 2 * k); }
  // It runs along the lines' order; columns along lines, plane after plane.
  float AcrossLines(int k, int column) const {
    const int plane = column / (line_ / 2);
    return At(plane * plane_step_ + k / 8 * atom_step_ + k % 8 * line_ + 2 * (column % (line_ / 2)));
  }

 private:
  float At(uint32_t offset) const {
    uint32_t address = start_ + offset;
    address ^= (address >> 7 & (line_ == 128 ? 7 : 3)) << 4;  // the swizzle is one of addresses
    host_run::Check(address + 2 <= host_run::Shared().size(), "wgmma of what lies outside of shared memory");
    uint16_t value;
    std::memcpy(&value, &host_run::Shared()[address], sizeof(value));
    return Bf16ToF32(value);
  }

  uint32_t start_, plane_step_, atom_step_;
  int line_;
};

// One lane's part of one product: `count` outputs d, and the first operand, in shared memory or in registers.
struct WgmmaLane {
  float* d;
  int count;
  bool from_zero;
  const uint32_t* a_registers;  // null: a
  uint64_t a, b;
};

inline void RunWgmma(const WgmmaLane& lane) {
  const WgmmaLane* mine = &lane;
  std::byte nothing = {};
  const int warp = static_cast<int>(threadIdx.x / 32 % 4);
  host_run::Collective("wgmma", &mine, sizeof(mine), &nothing, 0, [&](const std::byte* in, std::byte*) {
    const WgmmaLane* lanes[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&lanes[i], in + host_run::kLaneBytes * i, sizeof(lanes[i]));
    const WgmmaOperand a(lanes[0]->a), b(lanes[0]->b);
    const bool in_registers = lanes[0]->a_registers != nullptr;
    const auto rows = oracle::FactorMatrix::Of(16, 16, [&](int row, int k) {
      if (!in_registers) return a.AlongLines(16 * warp + row, k);
      const uint32_t word = lanes[row % 8 * 4 + k % 8 / 2]->a_registers[row / 8 + k / 8 * 2];
      return Bf16ToF32(static_cast<uint16_t>(word >> 16 * (k % 2)));
    });
    const auto columns = oracle::FactorMatrix::Of(2 * lanes[0]->count, 16, [&](int column, int k) {
      return in_registers ? b.AcrossLines(k, column) : b.AlongLines(column, k);
    });
    for (int i = 0; i < 32; ++i) {
      host_run::Check(lanes[i]->a == lanes[0]->a && lanes[i]->b == lanes[0]->b, "lanes of one warp at two products");
      for (int j = 0; j < lanes[i]->count; ++j) {
        float& d = lanes[i]->d[j];
        d = oracle::FusedStep(lanes[i]->from_zero ? 0.0f : d, rows.Row(i / 4 + j / 2 % 2 * 8),
                              columns.Row(j / 4 * 8 + 2 * (i % 4) + j % 2));
      }
    }
  });
}

// Products of a thread that write one accumulator and are not done.
inline std::map<std::pair<unsigned, const float*>, int>& UnfinishedWgmma() {
  static std::map<std::pair<unsigned, const float*>, int> unfinished;
  return unfinished;
}

inline void IssueWgmma(const WgmmaLane& lane) {
  const std::pair<unsigned, const float*> key(threadIdx.x, lane.d);
  std::vector<float> before;  // of the first of a chain
  if (UnfinishedWgmma()[key]++ == 0) {
    before.assign(lane.d, lane.d + lane.count);
    std::fill_n(lane.d, lane.count, NAN);
  }
  host_run::IssueProduct(128, [=] {
    std::copy(before.begin(), before.end(), lane.d);
    RunWgmma(lane);
    if (--UnfinishedWgmma()[key] > 0) return;
    UnfinishedWgmma().erase(key);
  });
}

template <int kCount>
void WgmmaScores(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  IssueWgmma({.d = d, .count = kCount, .from_zero = !accumulate, .a_registers = nullptr, .a = a, .b = b});
}
inline void WgmmaValues(float (&d)[64], const uint32_t* a, uint64_t b) {
  IssueWgmma({.d = d, .count = 64, .from_zero = false, .a_registers = a, .a = 0, .b = b});
}

}  // namespace lockstep::cuda

#include "kernels/cpu/cpu_features.h"

#include <atomic>

#include "hwy/targets.h"

namespace lockstep {
namespace {

std::atomic<bool> hidden = false;

bool Detect() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

}  // namespace

bool HasBf16Dot() {
  static const bool has = Detect();
  // It takes 512-bit vectors: a test that asks Highway for AVX2 gets AVX2.
  return has && !hidden.load(std::memory_order_relaxed) && (hwy::SupportedTargets() & HWY_AVX3) != 0;
}

void HideBf16DotForTest(bool hide) {
  hidden.store(hide, std::memory_order_relaxed);
}

}  // namespace lockstep

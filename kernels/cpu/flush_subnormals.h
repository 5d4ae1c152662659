// While it lives, this thread's floating-point arithmetic takes subnormal operands as zero and makes subnormal results
// zero, as the bf16 dot product instruction always does.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lockstep {

class FlushSubnormals {
 public:
  FlushSubnormals() : before_(Read()) { Write(before_ | kBits); }
  ~FlushSubnormals() { Write(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kBits = 0x8040;  // MXCSR: FTZ, DAZ
  static uint64_t Read() {
    return _mm_getcsr();
  }
  static void Write(uint64_t value) {
    _mm_setcsr(static_cast<uint32_t>(value));
  }
#elif defined(__aarch64__)
  static constexpr uint64_t kBits = uint64_t{1} << 24;  // FPCR: FZ, both ways
  static uint64_t Read() {
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void Write(uint64_t value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value));
  }
#else
#error "FlushSubnormals: how does this processor flush subnormals?"
#endif

  const uint64_t before_;
};

}  // namespace lockstep

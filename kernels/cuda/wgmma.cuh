// One warpgroup's matrix product of Hopper's tensor cores: D[64, n] += A[64, 16] * B[n, 16]^T in bf16 with fp32
// accumulators, both operands in shared memory as rows of 128 bytes in the 128-byte swizzle that TMA writes.
#pragma once

#include <cstdint>

namespace lockstep::cuda {

// Of 8-row groups of 1,024 bytes, one after the other. `address` is a shared-memory address: 1,024-byte aligned, plus
// 32 for every 16 elements of k.
__device__ inline uint64_t SwizzledOperand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnusedStride = uint64_t{1} << 16;  // ignored with rows as wide as the swizzle
  return kSwizzle128 | kGroupStride | kUnusedStride | ((address & 0x3FFFF) >> 4);
}

// Before the first product on registers that other instructions have touched.
__device__ inline void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed groups are under way.
template <int kPending>
__device__ inline void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers of `d` change outside the compiler's sight between products and a wait; this pins their order.
template <int kCount>
__device__ inline void PinRegisters(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D = A * B^T + (accumulate ? D : 0). Thread t of the warpgroup holds, with g = t / 4 % 8 and q = t % 4, of rows
// 16 * (t / 32) + g and that + 8 columns 8j + 2q and 8j + 2q + 1: d[4j], d[4j + 1] and d[4j + 2], d[4j + 3].
template <int kN>
struct Wgmma;

// The instruction spells out its registers, so each width is its own: R and O are the first n / 8 groups of four.
#define LOCKSTEP_R1 "%0, %1, %2, %3"
#define LOCKSTEP_R2 LOCKSTEP_R1 ", %4, %5, %6, %7"
#define LOCKSTEP_R3 LOCKSTEP_R2 ", %8, %9, %10, %11"
#define LOCKSTEP_R4 LOCKSTEP_R3 ", %12, %13, %14, %15"
#define LOCKSTEP_R5 LOCKSTEP_R4 ", %16, %17, %18, %19"
#define LOCKSTEP_R6 LOCKSTEP_R5 ", %20, %21, %22, %23"
#define LOCKSTEP_R7 LOCKSTEP_R6 ", %24, %25, %26, %27"
#define LOCKSTEP_R8 LOCKSTEP_R7 ", %28, %29, %30, %31"
#define LOCKSTEP_R9 LOCKSTEP_R8 ", %32, %33, %34, %35"
#define LOCKSTEP_R10 LOCKSTEP_R9 ", %36, %37, %38, %39"
#define LOCKSTEP_R11 LOCKSTEP_R10 ", %40, %41, %42, %43"
#define LOCKSTEP_R12 LOCKSTEP_R11 ", %44, %45, %46, %47"
#define LOCKSTEP_R13 LOCKSTEP_R12 ", %48, %49, %50, %51"
#define LOCKSTEP_R14 LOCKSTEP_R13 ", %52, %53, %54, %55"
#define LOCKSTEP_R15 LOCKSTEP_R14 ", %56, %57, %58, %59"
#define LOCKSTEP_R16 LOCKSTEP_R15 ", %60, %61, %62, %63"
#define LOCKSTEP_R17 LOCKSTEP_R16 ", %64, %65, %66, %67"
#define LOCKSTEP_R18 LOCKSTEP_R17 ", %68, %69, %70, %71"
#define LOCKSTEP_R19 LOCKSTEP_R18 ", %72, %73, %74, %75"
#define LOCKSTEP_R20 LOCKSTEP_R19 ", %76, %77, %78, %79"
#define LOCKSTEP_R21 LOCKSTEP_R20 ", %80, %81, %82, %83"
#define LOCKSTEP_R22 LOCKSTEP_R21 ", %84, %85, %86, %87"
#define LOCKSTEP_R23 LOCKSTEP_R22 ", %88, %89, %90, %91"
#define LOCKSTEP_R24 LOCKSTEP_R23 ", %92, %93, %94, %95"
#define LOCKSTEP_R25 LOCKSTEP_R24 ", %96, %97, %98, %99"
#define LOCKSTEP_R26 LOCKSTEP_R25 ", %100, %101, %102, %103"
#define LOCKSTEP_R27 LOCKSTEP_R26 ", %104, %105, %106, %107"
#define LOCKSTEP_R28 LOCKSTEP_R27 ", %108, %109, %110, %111"
#define LOCKSTEP_R29 LOCKSTEP_R28 ", %112, %113, %114, %115"
#define LOCKSTEP_R30 LOCKSTEP_R29 ", %116, %117, %118, %119"
#define LOCKSTEP_R31 LOCKSTEP_R30 ", %120, %121, %122, %123"
#define LOCKSTEP_R32 LOCKSTEP_R31 ", %124, %125, %126, %127"
#define LOCKSTEP_O1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define LOCKSTEP_O2 LOCKSTEP_O1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define LOCKSTEP_O3 LOCKSTEP_O2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define LOCKSTEP_O4 LOCKSTEP_O3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define LOCKSTEP_O5 LOCKSTEP_O4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define LOCKSTEP_O6 LOCKSTEP_O5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define LOCKSTEP_O7 LOCKSTEP_O6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define LOCKSTEP_O8 LOCKSTEP_O7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LOCKSTEP_O9 LOCKSTEP_O8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define LOCKSTEP_O10 LOCKSTEP_O9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define LOCKSTEP_O11 LOCKSTEP_O10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define LOCKSTEP_O12 LOCKSTEP_O11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define LOCKSTEP_O13 LOCKSTEP_O12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define LOCKSTEP_O14 LOCKSTEP_O13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define LOCKSTEP_O15 LOCKSTEP_O14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define LOCKSTEP_O16 LOCKSTEP_O15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define LOCKSTEP_O17 LOCKSTEP_O16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define LOCKSTEP_O18 LOCKSTEP_O17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define LOCKSTEP_O19 LOCKSTEP_O18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define LOCKSTEP_O20 LOCKSTEP_O19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define LOCKSTEP_O21 LOCKSTEP_O20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define LOCKSTEP_O22 LOCKSTEP_O21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define LOCKSTEP_O23 LOCKSTEP_O22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define LOCKSTEP_O24 LOCKSTEP_O23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define LOCKSTEP_O25 LOCKSTEP_O24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define LOCKSTEP_O26 LOCKSTEP_O25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define LOCKSTEP_O27 LOCKSTEP_O26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define LOCKSTEP_O28 LOCKSTEP_O27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define LOCKSTEP_O29 LOCKSTEP_O28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define LOCKSTEP_O30 LOCKSTEP_O29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define LOCKSTEP_O31 LOCKSTEP_O30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define LOCKSTEP_O32 LOCKSTEP_O31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// `a`, `b`, `c`: the numbers of the operands after the registers.
#define LOCKSTEP_WGMMA(n, groups, a, b, c)                                                            \
  template <>                                                                                         \
  struct Wgmma<n> {                                                                                   \
    static __device__ void Run(float (&d)[n / 2], uint64_t a_rows, uint64_t b_rows, int accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c                                            \
                   ", 0;\n"                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" LOCKSTEP_R##groups    \
                   "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n}"                                           \
                   : LOCKSTEP_O##groups                                                               \
                   : "l"(a_rows), "l"(b_rows), "r"(accumulate));                                      \
    }                                                                                                 \
  };

LOCKSTEP_WGMMA(8, 1, 4, 5, 6)
LOCKSTEP_WGMMA(16, 2, 8, 9, 10)
LOCKSTEP_WGMMA(24, 3, 12, 13, 14)
LOCKSTEP_WGMMA(32, 4, 16, 17, 18)
LOCKSTEP_WGMMA(40, 5, 20, 21, 22)
LOCKSTEP_WGMMA(48, 6, 24, 25, 26)
LOCKSTEP_WGMMA(56, 7, 28, 29, 30)
LOCKSTEP_WGMMA(64, 8, 32, 33, 34)
LOCKSTEP_WGMMA(72, 9, 36, 37, 38)
LOCKSTEP_WGMMA(80, 10, 40, 41, 42)
LOCKSTEP_WGMMA(88, 11, 44, 45, 46)
LOCKSTEP_WGMMA(96, 12, 48, 49, 50)
LOCKSTEP_WGMMA(104, 13, 52, 53, 54)
LOCKSTEP_WGMMA(112, 14, 56, 57, 58)
LOCKSTEP_WGMMA(120, 15, 60, 61, 62)
LOCKSTEP_WGMMA(128, 16, 64, 65, 66)
LOCKSTEP_WGMMA(136, 17, 68, 69, 70)
LOCKSTEP_WGMMA(144, 18, 72, 73, 74)
LOCKSTEP_WGMMA(152, 19, 76, 77, 78)
LOCKSTEP_WGMMA(160, 20, 80, 81, 82)
LOCKSTEP_WGMMA(168, 21, 84, 85, 86)
LOCKSTEP_WGMMA(176, 22, 88, 89, 90)
LOCKSTEP_WGMMA(184, 23, 92, 93, 94)
LOCKSTEP_WGMMA(192, 24, 96, 97, 98)
LOCKSTEP_WGMMA(200, 25, 100, 101, 102)
LOCKSTEP_WGMMA(208, 26, 104, 105, 106)
LOCKSTEP_WGMMA(216, 27, 108, 109, 110)
LOCKSTEP_WGMMA(224, 28, 112, 113, 114)
LOCKSTEP_WGMMA(232, 29, 116, 117, 118)
LOCKSTEP_WGMMA(240, 30, 120, 121, 122)
LOCKSTEP_WGMMA(248, 31, 124, 125, 126)
LOCKSTEP_WGMMA(256, 32, 128, 129, 130)

#undef LOCKSTEP_O32
#undef LOCKSTEP_O31
#undef LOCKSTEP_O30
#undef LOCKSTEP_O29
#undef LOCKSTEP_O28
#undef LOCKSTEP_O27
#undef LOCKSTEP_O26
#undef LOCKSTEP_O25
#undef LOCKSTEP_O24
#undef LOCKSTEP_O23
#undef LOCKSTEP_O22
#undef LOCKSTEP_O21
#undef LOCKSTEP_O20
#undef LOCKSTEP_O19
#undef LOCKSTEP_O18
#undef LOCKSTEP_O17
#undef LOCKSTEP_O16
#undef LOCKSTEP_O15
#undef LOCKSTEP_O14
#undef LOCKSTEP_O13
#undef LOCKSTEP_O12
#undef LOCKSTEP_O11
#undef LOCKSTEP_O10
#undef LOCKSTEP_O9
#undef LOCKSTEP_O8
#undef LOCKSTEP_O7
#undef LOCKSTEP_O6
#undef LOCKSTEP_O5
#undef LOCKSTEP_O4
#undef LOCKSTEP_O3
#undef LOCKSTEP_O2
#undef LOCKSTEP_O1
#undef LOCKSTEP_R32
#undef LOCKSTEP_R31
#undef LOCKSTEP_R30
#undef LOCKSTEP_R29
#undef LOCKSTEP_R28
#undef LOCKSTEP_R27
#undef LOCKSTEP_R26
#undef LOCKSTEP_R25
#undef LOCKSTEP_R24
#undef LOCKSTEP_R23
#undef LOCKSTEP_R22
#undef LOCKSTEP_R21
#undef LOCKSTEP_R20
#undef LOCKSTEP_R19
#undef LOCKSTEP_R18
#undef LOCKSTEP_R17
#undef LOCKSTEP_R16
#undef LOCKSTEP_R15
#undef LOCKSTEP_R14
#undef LOCKSTEP_R13
#undef LOCKSTEP_R12
#undef LOCKSTEP_R11
#undef LOCKSTEP_R10
#undef LOCKSTEP_R9
#undef LOCKSTEP_R8
#undef LOCKSTEP_R7
#undef LOCKSTEP_R6
#undef LOCKSTEP_R5
#undef LOCKSTEP_R4
#undef LOCKSTEP_R3
#undef LOCKSTEP_R2
#undef LOCKSTEP_R1
#undef LOCKSTEP_WGMMA

}  // namespace lockstep::cuda

// What the CPU has beyond the instruction sets that Highway picks among.
#pragma once

namespace lockstep {

// AVX512-BF16: vdpbf16ps, the dot product of pairs of bf16.
bool HasBf16Dot();

// Hides it, so that a test can compare bits with and without.
void HideBf16DotForTest(bool hide);

}  // namespace lockstep

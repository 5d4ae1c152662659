// The GPU's approximate functions and the CUDA library functions built on them, bit for bit, on a CPU.
//
// The *Approx functions are single instructions: a slice of the argument's significand picks three coefficients, and a
// quadratic is evaluated in truncated fixed point. The others are CUDA's own code for them, a handful of operations.
#pragma once

namespace lockstep::oracle {

// A function of one fp32 value: what a program takes where another implementation may be put in its place.
using Function = float (*)(float);

float Exp2Approx(float x);        // ex2.approx.ftz.f32
float ReciprocalApprox(float x);  // rcp.approx.ftz.f32
float RsqrtApprox(float x);       // rsqrt.approx.ftz.f32
float SqrtApprox(float x);        // sqrt.approx.ftz.f32

float DivFull(float numerator, float denominator);  // div.full.f32

// CUDA's expf, logf, log1pf and rsqrtf as compiled without fast-math: what PyTorch's element-wise kernels call.
float Exp(float x);
float Log(float x);
float Log1p(float x);
float Rsqrt(float x);

}  // namespace lockstep::oracle

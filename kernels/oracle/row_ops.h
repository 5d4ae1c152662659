// PyTorch's and fla's row-wise and element-wise operations with a GPU's bits. bf16 is its 16 bits; what is not said to
// be bf16 is fp32.
#pragma once

#include <cstdint>
#include <span>

namespace lockstep::oracle {

// Nearest bf16, ties to even; every NaN is 0x7FFF, the GPU's conversion.
uint16_t ToBf16(float value);

// x.mean(-1) of PyTorch for tensors of 16 rows and more; a multiple of 4 wide.
float RowMean(std::span<const float> x);

// transformers' RMSNorm: fp32 inside, weight multiplied in fp32, one rounding.
void RmsNorm(std::span<const uint16_t> x, std::span<const uint16_t> weight, float eps, uint16_t* y);

// transformers' gated RMSNorm: rounded after the norm, after the weight and after silu(gate), which stays fp32.
void GatedRmsNorm(std::span<const uint16_t> x, std::span<const uint16_t> weight, std::span<const uint16_t> gate,
                  float eps, uint16_t* y);

// fla's l2norm; at most 128 wide, eps 1e-6.
void L2Norm(std::span<const uint16_t> x, uint16_t* y);

// One channel of PyTorch's causal convolution of width 4: x and weight [4], oldest first. To be followed by Silu.
uint16_t ConvTaps(const uint16_t* x, const uint16_t* weight);

float Sigmoid(float x);
float Silu(float x);
float Softplus(float x);  // PyTorch's: x itself above 20

// Of a bf16 tensor: computed in fp32 and rounded.
uint16_t SigmoidBf16(uint16_t x);
uint16_t SiluBf16(uint16_t x);
uint16_t SwiGlu(uint16_t gate, uint16_t up);  // silu rounded before the product

float GdnDecay(float a_log, uint16_t a, float dt_bias);  // g
uint16_t GdnBeta(uint16_t b);                            // 2 * sigmoid(b), both in bf16

// log_softmax over one row in fp32: the log-probability of x is (x - maximum) - log_sum.
struct LogSoftmax {
  float maximum;
  float log_sum;

  float operator()(float x) const { return (x - maximum) - log_sum; }
};
// misaligned: floats from the last 16-byte boundary in memory to the row's first element, 0 to 3. The order of the sum
// depends on it: row r of a contiguous tensor has (r * width) % 4.
LogSoftmax LogSoftmaxRow(std::span<const float> logits, int misaligned = 0);

}  // namespace lockstep::oracle

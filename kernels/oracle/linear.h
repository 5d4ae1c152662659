// A linear layer with the trainer's bits: one ascending chain over the input's width for every output, then one
// rounding.
#pragma once

#include <cstdint>

namespace lockstep::oracle {

struct LinearShape {
  int rows;
  int inputs;
  int outputs;
};

// x: [rows, inputs] bf16; weight: [outputs, inputs] bf16; sums: [rows, outputs] fp32, before the rounding.
void LinearSums(LinearShape shape, const uint16_t* x, const uint16_t* weight, float* sums);

// y: [rows, outputs] bf16.
void Linear(LinearShape shape, const uint16_t* x, const uint16_t* weight, uint16_t* y);

}  // namespace lockstep::oracle

#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/attention_decode_spread.cu"

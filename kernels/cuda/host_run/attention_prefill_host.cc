#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/attention_prefill.cu"

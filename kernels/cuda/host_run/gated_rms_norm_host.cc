#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/gated_rms_norm.cu"

#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/sampling/adjust_rows.cu"

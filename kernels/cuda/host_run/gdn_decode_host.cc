#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/gdn_decode.cu"

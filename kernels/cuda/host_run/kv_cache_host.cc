#include "kernels/cuda/host_run/prelude.h"
//
#include "kernels/cuda/kv_cache.cu"

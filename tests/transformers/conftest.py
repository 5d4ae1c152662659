"""Before torch is imported: oneDNN and oneMKL without AMX, whose bf16 products sum in an order that hf-torch does not
know.
"""

import os
import pathlib

CPU_INFO = pathlib.Path("/proc/cpuinfo")

if CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text():
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX512_E3")

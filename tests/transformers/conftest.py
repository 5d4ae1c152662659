"""Before torch is imported: bf16 products as CPUs without AMX give them, which is what the tolerances are of."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

"""Before torch is imported: oneDNN without AMX, whose bf16 products sum in an order that hf-torch does not know."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

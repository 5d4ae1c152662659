"""How a manifest's tensors are cut into broadcasts: the rule of the worker's weights_sync/bucket_plan.h.

Tensors in the manifest's order fill buckets of `bucket_bytes` (a multiple of 256). A piece of a tensor starts at the
next multiple of 256 in its bucket and is as long as the tensor or the bucket allows; the rest of the tensor starts the
next bucket. A tensor of no bytes has no piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGN = 256


class Piece(NamedTuple):
    tensor: int  # index into the manifest
    tensor_offset: int  # bytes
    bytes: int
    bucket_offset: int


def plan_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[list[Piece]]:
    """sizes: bytes of every tensor, in the manifest's order."""
    if bucket_bytes < ALIGN or bucket_bytes % ALIGN:
        raise ValueError(f"bucket_bytes: {bucket_bytes}, want a multiple of {ALIGN}")
    buckets: list[list[Piece]] = []
    used = bucket_bytes
    for tensor, size in enumerate(sizes):
        done = 0
        while done < size:
            if used >= bucket_bytes:
                buckets.append([])
                used = 0
            part = min(size - done, bucket_bytes - used)
            buckets[-1].append(Piece(tensor, done, part, used))
            used += -(-part // ALIGN) * ALIGN
            done += part
    return buckets

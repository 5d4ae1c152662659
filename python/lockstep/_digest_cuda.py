"""lockstep.digest on a GPU in one pass, without waiting: what Triton, which comes with PyTorch for CUDA, compiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._digest import _finish

_BLOCK = 1024
_PROGRAMS = 512
_MASK = (1 << 64) - 1


@triton.jit
def _mix(x):
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _digest_kernel(words, count, out, BLOCK: tl.constexpr):
    # Integers: the order of a sum does not show.
    total = tl.zeros([BLOCK], dtype=tl.uint64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(start, count, step):
        index = begin + tl.arange(0, BLOCK)
        inside = index < count
        word = tl.load(words + index, mask=inside, other=0).to(tl.uint64, bitcast=True)
        term = _mix(word + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        total += tl.where(inside, term, 0)
    tl.atomic_add(out, tl.sum(total, axis=0).to(tl.int64, bitcast=True))


class Digests:
    """Digests of tensors on one device, launched on the current stream and read together at the end."""

    def __init__(self, count: int, device: torch.device):
        self._sums = torch.zeros(count, dtype=torch.int64, device=device)
        self._bytes = [0] * count

    def add(self, index: int, tensor: torch.Tensor) -> None:
        """tensor: contiguous, of the device; it must stay until the stream has come past here."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        self._bytes[index] = flat.numel()
        if flat.numel() % 8 or flat.data_ptr() % 8:
            padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
            padded[: flat.numel()] = flat
            flat = padded
        words = flat.view(torch.int64)
        if words.numel():
            programs = min(_PROGRAMS, triton.cdiv(words.numel(), _BLOCK))
            _digest_kernel[(programs,)](words, words.numel(), self._sums[index:], BLOCK=_BLOCK)

    def read(self) -> list[int]:
        """Waits for the current stream."""
        return [_finish(total & _MASK, size) for total, size in zip(self._sums.tolist(), self._bytes, strict=True)]

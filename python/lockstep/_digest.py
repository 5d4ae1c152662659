"""A 64-bit digest of a tensor's bytes, the same in numpy, in torch (CPU and CUDA) and in the worker.

The contiguous, row-major, little-endian bytes, padded with zeros to a multiple of 8, are u64 words w_0, w_1, ...
Modulo 2^64, with logical shifts:

    mix(x) = x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
    digest = mix(number_of_bytes + sum over i of mix(w_i + (i + 1) * 0x9E3779B97F4A7C15))

Position-dependent (swapped rows show) and a sum (blocks can be computed anywhere, in any order). It detects accidents,
not attackers. dtype and shape are not part of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

# Words at a time: what fits a core's cache; on a GPU, enough to fill it.
_CPU_WORDS = 1 << 16
_CUDA_WORDS = 1 << 22


def digest(tensor: np.ndarray | torch.Tensor) -> int:
    """The digest of an array or tensor of any dtype and shape, as an int in [0, 2^64).

    A CUDA tensor is digested on its device; the call waits for the result. A non-contiguous one is copied first.
    Raises TypeError for anything else.
    """
    if isinstance(tensor, np.ndarray):
        return _numpy_digest(tensor)
    torch = sys.modules.get("torch")  # a torch tensor is no reason to import torch: who has one has imported it
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _torch_digest(tensor)
    raise TypeError(f"digest: {type(tensor).__name__}, want numpy.ndarray or torch.Tensor")


def _finish(total: int, number_of_bytes: int) -> int:
    x = (total + number_of_bytes) & _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def _numpy_digest(array: np.ndarray) -> int:
    if array.dtype.hasobject:
        raise TypeError(f"digest: dtype {array.dtype}, want plain numbers")
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    steps = np.arange(1, _CPU_WORDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    shifted = np.empty(_CPU_WORDS, np.uint64)
    total = 0
    for begin in range(0, flat.size, 8 * _CPU_WORDS):
        block = flat[begin : begin + 8 * _CPU_WORDS]
        if block.size % 8:
            block = np.concatenate([block, np.zeros(-block.size % 8, np.uint8)])
        x = block.view("<u8") + steps[: block.size // 8]
        x += np.uint64((begin // 8 * _GOLDEN) & _MASK)
        y = shifted[: x.size]
        for shift, factor in ((30, _M1), (27, _M2), (31, None)):
            np.right_shift(x, np.uint64(shift), out=y)
            x ^= y
            if factor is not None:
                x *= np.uint64(factor)
        total += int(x.sum(dtype=np.uint64))
    return _finish(total, flat.size)


def _signed(value: int) -> int:
    """The int64 that has the bits of a u64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _torch_digest(tensor: torch.Tensor) -> int:
    import torch

    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"digest: a {tensor.layout} tensor on {tensor.device}, want a dense one with data")
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = _CUDA_WORDS if flat.is_cuda else _CPU_WORDS
    steps = torch.arange(1, min(words, flat.numel() // 8 + 1) + 1, dtype=torch.int64, device=flat.device)
    steps *= _signed(_GOLDEN)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), 8 * words):
        block = flat[begin : begin + 8 * words]
        if block.numel() % 8:
            block = torch.nn.functional.pad(block, (0, -block.numel() % 8))
        elif block.data_ptr() % 8 or block.storage_offset() % 8:
            block = block.clone()
        # int64 has the same sums and products modulo 2^64; a logical shift is an arithmetic one without its sign bits.
        x = block.view(torch.int64) + steps[: block.numel() // 8]
        x += _signed(begin // 8 * _GOLDEN)
        for shift, factor in ((30, _M1), (27, _M2), (31, None)):
            y = x >> shift
            y &= (1 << (64 - shift)) - 1
            x ^= y
            if factor is not None:
                x *= _signed(factor)
        total += x.sum()
    return _finish(int(total.item()) & _MASK, flat.numel())

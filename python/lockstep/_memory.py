"""Where a publisher's tensors are while NCCL reads them: on a GPU, or, with a library that takes it, in host memory."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._digest import digest
from .errors import NotSupported


class HostMemory:
    """For a library without streams, whose broadcast is over when its call returns. For tests on machines without GPUs."""

    stream = 0

    def __init__(self, tensors: int):
        self._digests = [0] * tensors

    def use(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def take(self, tensor: Any) -> tuple[int, Any]:
        """Address of the tensor's bytes, and what keeps them there."""
        if not isinstance(tensor, np.ndarray):
            tensor = tensor.detach().cpu().contiguous()
            return tensor.data_ptr(), tensor
        array = np.ascontiguousarray(tensor)
        return array.ctypes.data, array

    def ready(self, tensors: Sequence[tuple[int, Any]]) -> None:
        """They were all taken, and will be broadcast next. Counts their digests, by index."""
        for index, tensor in tensors:
            self._digests[index] = digest(tensor)

    def hold(self, tensors: list[Any]) -> None:
        """Keeps them until what is on the stream now has happened."""

    def idle(self) -> bool:
        return True

    def digests(self) -> list[int]:
        return self._digests


class CudaMemory:
    """A device, with a stream of its own for broadcasts and one for digests."""

    def __init__(self, tensors: int, device: Any):
        try:
            import torch

            from ._digest_cuda import Digests
        except ImportError as error:
            raise NotSupported(f"transport: 'nccl' needs torch with CUDA and triton, and found none: {error}") from None
        self._torch = torch
        self.device = torch.device(device)
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream()
            self._digest_stream = torch.cuda.Stream()
            with torch.cuda.stream(self._digest_stream):
                self._digests = Digests(tensors, self.device)
        self.stream = self._stream.cuda_stream
        self._held: deque[tuple[list[Any], list[Any]]] = deque()

    def use(self) -> contextlib.AbstractContextManager[Any]:
        return self._torch.cuda.device(self.device)

    def take(self, tensor: Any) -> tuple[int, Any]:
        tensor = self._torch.as_tensor(tensor).detach().to(self.device, non_blocking=True).contiguous()
        return tensor.data_ptr(), tensor

    def ready(self, tensors: Sequence[tuple[int, Any]]) -> None:
        made = self._torch.cuda.current_stream().record_event()
        self._stream.wait_event(made)
        self._digest_stream.wait_event(made)
        with self._torch.cuda.stream(self._digest_stream):
            for index, tensor in tensors:
                self._digests.add(index, tensor)

    def hold(self, tensors: list[Any]) -> None:
        self._held.append((tensors, [self._stream.record_event(), self._digest_stream.record_event()]))
        while self._held and all(event.query() for event in self._held[0][1]):
            self._held.popleft()

    def idle(self) -> bool:
        return self._stream.query() and self._digest_stream.query()

    def digests(self) -> list[int]:
        with self._torch.cuda.stream(self._digest_stream):
            return self._digests.read()

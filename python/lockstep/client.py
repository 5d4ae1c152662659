"""RolloutClient without async: the asyncio client, run on a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from . import aio

if TYPE_CHECKING:
    import numpy as np

    from lockstep.v1 import rollout_pb2 as pb

    from .rollouts import Rollouts

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all clients of the process (gRPC's asyncio wants one), on a thread that ends with it."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="lockstep", daemon=True).start()
        return _loop


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C: what runs at the workers is aborted
        future.cancel()
        raise


class RolloutClient:
    """As lockstep.aio.RolloutClient, with the same parameters; its methods block. Any thread may call them.

    with RolloutClient(["host:50051"]) as client:
        rollouts = client.generate(prompts, SamplingParams(max_tokens=256), n=8)
    """

    def __init__(self, workers: Any, **options: Any):
        self._client = aio.RolloutClient(workers, **options)

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        _run(self._client.close())

    def generate(self, *arguments: Any, **keywords: Any) -> Rollouts:
        return _run(self._client.generate(*arguments, **keywords))

    def score(self, *arguments: Any, **keywords: Any) -> list[np.ndarray]:
        return _run(self._client.score(*arguments, **keywords))

    def info(self) -> dict[str, pb.GetInfoResponse]:
        return _run(self._client.info())

    def load(self) -> dict[str, pb.GetLoadResponse]:
        return _run(self._client.load())


for _name in ("generate", "score", "info", "load"):  # one text, and help() shows the real parameters
    _method = getattr(RolloutClient, _name)
    _method.__doc__ = getattr(aio.RolloutClient, _name).__doc__
    _method.__signature__ = inspect.signature(getattr(aio.RolloutClient, _name))

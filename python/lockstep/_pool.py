"""Which worker takes the next request. No I/O."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class WorkerState:
    """One worker as a client sees it."""

    address: str
    healthy: bool = False
    in_flight: int = 0  # samples of this client
    reported: int = 0  # samples that run or wait there, by its last GetLoad
    avoid_until: float = 0.0  # time.monotonic(): it asked for patience until then
    last_error: str = "not checked yet"
    denied: str = ""  # why it does not take this client's token
    missed_checks: int = 0  # health checks in a row that it did not answer in time
    readers: set[Any] = dataclasses.field(default_factory=set)  # tasks that read its streams

    @property
    def load(self) -> int:
        return max(self.in_flight, self.reported)

    def stop_reading(self) -> None:
        for reader in self.readers:
            reader.cancel()


class Pool:
    def __init__(self, addresses: Sequence[str]):
        if isinstance(addresses, str):
            addresses = [addresses]
        if not addresses or len(set(addresses)) != len(addresses):
            raise ValueError(f"workers: {list(addresses)!r}, want one or more different HOST:PORT")
        self.workers = [WorkerState(address) for address in addresses]

    def pick(self, session_id: str = "", exclude: Sequence[str] = (), now: float | None = None) -> WorkerState | None:
        """The least loaded healthy worker; for a session always the same one while it is healthy. None: none is fit.

        exclude: workers to take only if there is no other.
        """
        now = time.monotonic() if now is None else now
        fit = [w for w in self.workers if w.healthy and w.avoid_until <= now]
        fit = [w for w in fit if w.address not in exclude] or fit
        if not fit:
            return None
        if session_id:  # rendezvous hashing: a worker that goes away moves only its own sessions
            return max(fit, key=lambda w: hashlib.blake2b(f"{session_id}\0{w.address}".encode()).digest())
        return min(fit, key=lambda w: w.load)

    def describe(self) -> str:
        return "; ".join(f"{w.address}: {'healthy' if w.healthy else w.last_error}" for w in self.workers)

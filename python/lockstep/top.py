"""`lockstep top`: what workers are doing now, as a table that renews itself."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from lockstep.v1 import rollout_pb2 as pb
from lockstep.v1 import rollout_pb2_grpc

from ._channel import Credentials
from .errors import LockstepError

# A worker answers at once, between two steps or in one; longer, and it is shown as not answering.
TIMEOUT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One worker's answer, at `at` (time.monotonic()), or why there is none."""

    at: float
    load: Any = None  # GetLoadResponse
    error: str = ""


class Poller:
    """Asks every worker for its load at once."""

    def __init__(self, addresses: Sequence[str], token: str | None = None, tls_ca: str | pathlib.Path | None = None):
        credentials = Credentials(token, tls_ca)
        self._channels = {address: credentials.channel(address) for address in addresses}
        self._stubs = {address: rollout_pb2_grpc.RolloutStub(channel) for address, channel in self._channels.items()}
        self._threads = concurrent.futures.ThreadPoolExecutor(min(32, max(1, len(self._stubs))))

    def __enter__(self) -> Poller:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown()
        for channel in self._channels.values():
            channel.close()

    def poll(self) -> dict[str, Sample]:
        return dict(zip(self._stubs, self._threads.map(self._ask, self._stubs.values()), strict=True))

    @staticmethod
    def _ask(stub: Any) -> Sample:
        try:
            load = stub.GetLoad(pb.GetLoadRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            name = error.code().name
            return Sample(time.monotonic(), error=f"{name}: {error.details()}" if error.details() else name)
        return Sample(time.monotonic(), load=load)


def rate(before: Sample | None, now: Sample, field: str) -> float | None:
    """How much a counter of the load has grown a second. None: not known, or the worker has started anew."""
    if before is None or before.load is None or now.load is None or now.at <= before.at:
        return None
    grown = getattr(now.load, field) - getattr(before.load, field)
    return grown / (now.at - before.at) if grown >= 0 else None


def duration(seconds: float) -> str:
    """Two units at most: 4.2 s, 3 min 10 s, 5 h 2 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _of(used: int, total: int) -> str:
    return f"{used} of {total}" if total else "none"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


COLUMNS = (
    "worker", "tok/s", "prompt tok/s", "running", "waiting", "KV pages", "state slots", "step, ms", "preempted",
    "weights", "since",
)  # fmt: skip


def row(address: str, before: Sample | None, now: Sample) -> list[str]:
    """The cells of COLUMNS; of a worker that does not answer, why."""
    if now.load is None:
        return [address, now.error]
    load = now.load
    version = load.weight_version
    steps, steps_ms = rate(before, now, "steps"), rate(before, now, "steps_ms")
    return [
        address,
        _number(rate(before, now, "generated_tokens")),
        _number(rate(before, now, "prefill_tokens")),
        f"{load.running_sequences}",
        f"{load.waiting_sequences}" + (f" + {n} for weights" if (n := load.version_waiting_requests) else ""),
        _of(load.kv_pages_used, load.kv_pages_total),
        _of(load.state_slots_used, load.state_slots_total),
        f"{steps_ms / steps:.2f}" if steps and steps_ms is not None else "",
        f"{load.preemptions}",
        f"{version.epoch}.{version.step}" + (" draining" if load.draining else ""),
        duration(load.weights_age_ms / 1000),
    ]


def footer(before: Mapping[str, Sample], now: Mapping[str, Sample]) -> str:
    """The fleet in a line: its rate, who does not answer, how many versions serve."""
    known = [r for address, s in now.items() if (r := rate(before.get(address), s, "generated_tokens")) is not None]
    versions = {(s.load.weight_version.epoch, s.load.weight_version.step) for s in now.values() if s.load is not None}
    silent = sum(s.load is None for s in now.values())
    text = f"{len(now)} workers, {sum(known):,.0f} tok/s"
    if silent:
        text += f", {silent} not answering"
    if len(versions) > 1:
        text += f", {len(versions)} versions of the weights: {', '.join(f'{e}.{s}' for e, s in sorted(versions))}"
    return text


def check_line(path: str | pathlib.Path) -> str:
    """What the last `lockstep parity --json` found, and when."""
    path = pathlib.Path(path)
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
        found = json.loads(path.read_text())
        layouts = {
            r["layout"]: [r["metrics"][f"vllm_vs_local_logprob_diff_{what}"] for what in ("mean", "max")]
            for r in found["layouts"]
        }
    except FileNotFoundError:
        return f"last check: none yet in {path}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LockstepError(f"--check {path}: {error!r}; want the file of lockstep parity --json") from None
    cells = [f"{name} mean {mean:.3g}, largest {worst:.3g}" for name, (mean, worst) in layouts.items()]
    return f"last check, {duration(age)} ago: |rollout - trainer| {'; '.join(cells)}"


def _check_or_error(path: str | pathlib.Path) -> str:
    """For a table that goes on: the file may be in the making, or gone for a while."""
    try:
        return check_line(path)
    except LockstepError as error:
        return str(error)


def render(before: Mapping[str, Sample], now: Mapping[str, Sample], check: str = "") -> Any:
    """A rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    for address, sample in now.items():
        cells = row(address, before.get(address), sample)
        table.add_row(*(Text(cell) for cell in cells), style="red" if sample.load is None else "")
    lines = [Text(footer(before, now))] + ([Text(check)] if check else [])
    return Group(table, *lines)


def run(
    addresses: Sequence[str],
    *,
    interval_s: float = 2.0,
    check: str | None = None,
    once: bool = False,
    token: str | None = None,
    tls_ca: str | None = None,
) -> int:
    """Shows the table until Ctrl-C; `once`: one table, after one interval. Returns 0, or 1 if `once` and a worker did not
    answer.
    """
    if not (math.isfinite(interval_s) and interval_s >= 0.1):
        raise LockstepError(f"--interval: {interval_s}; want seconds, at least 0.1")
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise LockstepError(
            "top needs the package rich: pip install './python[extras]' in the project's folder, or rich"
        ) from None

    with Poller(addresses, token, tls_ca) as poller:
        before = poller.poll()
        if once:
            time.sleep(interval_s)
            now = poller.poll()
            Console().print(render(before, now, check_line(check) if check else ""))
            return int(any(s.load is None for s in now.values()))
        try:
            with Live(render({}, before, check_line(check) if check else ""), auto_refresh=False) as live:
                while True:
                    time.sleep(interval_s)
                    now = poller.poll()
                    live.update(render(before, now, _check_or_error(check) if check else ""), refresh=True)
                    before = now
        except KeyboardInterrupt:
            return 0

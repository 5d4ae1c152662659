"""New weights into running workers: all of them, or none.

    publisher = WeightPublisher(["host1:50052", "host2:50052"], manifest_from=model)
    publisher.publish((0, step), model.state_dict().items())

The sequence is proto/lockstep/v1/weights.proto's: Begin everywhere; when all have accepted, the iterator is pulled once
and each tensor goes to every worker; Verify everywhere; Begin again, which finds who has lost the update meanwhile;
Commit everywhere. A failure before Commit is rolled back everywhere, so that all workers go on with the old weights.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import numbers
import operator
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from lockstep.v1 import rollout_pb2, weights_pb2, weights_pb2_grpc

from ._broadcast import Broadcast, Groups
from ._channel import LIVENESS_OPTIONS, Credentials
from ._digest import digest
from ._memory import CudaMemory, HostMemory
from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    LockstepError,
    RollbackFailed,
    UpdateFailed,
    WorkerUnavailable,
    from_rpc,
)
from .rollouts import Version

Code = grpc.StatusCode
_DTYPES = {
    "float32": weights_pb2.TENSOR_DTYPE_FLOAT32,
    "bfloat16": weights_pb2.TENSOR_DTYPE_BFLOAT16,
    "float16": weights_pb2.TENSOR_DTYPE_FLOAT16,
}
_POLICIES = {
    "finish": weights_pb2.IN_FLIGHT_POLICY_FINISH,
    "keep": weights_pb2.IN_FLIGHT_POLICY_KEEP,
    "recompute": weights_pb2.IN_FLIGHT_POLICY_RECOMPUTE,
    "abort": weights_pb2.IN_FLIGHT_POLICY_ABORT,
}
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    *LIVENESS_OPTIONS,
]
# With allow_partial: until when a stage may last, as a part of timeout_s. A worker that hangs leaves the others time.
_STAGE_ENDS = {"begin": 0.3, "push": 0.8, "verify": 0.9, "confirm": 0.95}
# Of the codes of a Join or Receive, those that may be another rank's doing.
_ANOTHERS = (Code.UNAVAILABLE, Code.CANCELLED, Code.DEADLINE_EXCEEDED, None)
_REFUSED = (Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED)  # of a Commit
_MOST, _MOST_S = 2**63 - 1, 1_000_000  # of an int64; of limits, in seconds
_GROUP_ROUNDS = 3  # groups that may fail although nobody has lost the update


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as it will be sent: name as in transformers' state_dict, dtype "float32" | "bfloat16" | "float16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * (4 if self.dtype == "float32" else 2)


@dataclasses.dataclass
class WorkerReport:
    """What became of an update at one worker. Durations in seconds, None where that stage was not reached."""

    worker: str
    version: Version | None = None  # that serves, by the worker's own word; None: it could not be asked
    error: LockstepError | None = None
    failed_in: str | None = None  # "begin", "push", "verify", "confirm" (had the update no more) or "commit"
    begin_s: float | None = None
    push_s: float | None = None  # from the first to the last byte; includes waiting for the iterator
    verify_s: float | None = None
    confirm_s: float | None = None  # Begin once more, when all have verified
    commit_s: float | None = None
    pause_ms: float | None = None  # for which no step ran
    wait_ms: float | None = None  # for requests to finish, and for the step boundary
    kept: int = 0  # samples in flight, by what became of them
    recomputed: int = 0
    aborted: int = 0
    resumed: int = 0  # times a broken stream was taken up again
    served_before: bool = False  # it had the version already: it was sent nothing, whatever the tensors


@dataclasses.dataclass
class PublishReport:
    version: Version
    workers: list[WorkerReport]
    tensors: int
    bytes: int  # to each worker
    seconds: float = 0.0

    @property
    def failed(self) -> list[WorkerReport]:
        return [w for w in self.workers if w.error is not None]

    def __str__(self) -> str:
        lines = [
            f"weights {tuple(self.version)}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB, {self.seconds:.3f} s"
        ]
        for w in self.workers:
            serves = f"serves {tuple(w.version)}" if w.version else "version unknown"
            if w.served_before and w.error is None:
                serves += " as it did before: nothing was sent"
            lines.append(f"  {w.worker}: {serves}" + (f"; {w.failed_in}: {w.error}" if w.error else ""))
        return "\n".join(lines)


def manifest_of(source: Any) -> list[TensorSpec]:
    """TensorSpecs of a torch module (its state_dict) or of a list of (name, dtype, shape) or TensorSpec."""
    if hasattr(source, "state_dict"):
        source = [(name, tensor.dtype, tensor.shape) for name, tensor in source.state_dict().items()]
    specs = []
    for entry in source:
        if not isinstance(entry, TensorSpec):
            name, dtype, shape = entry
            entry = TensorSpec(name, str(dtype).removeprefix("torch."), tuple(int(s) for s in shape))
        if entry.dtype not in _DTYPES:
            raise InvalidRequest(f"manifest: {entry.name} is {entry.dtype}, want one of {', '.join(_DTYPES)}")
        specs.append(entry)
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidRequest(f"manifest: {len(names)} tensors, named twice: {twice[:10]}; want each once, at least one")
    return specs


class WeightPublisher:
    """Publishes weight versions to any number of workers.

    workers: HOST:PORT of the workers' control planes.
    manifest_from: a torch module, or (name, dtype, shape) of every tensor as it will be sent. Under ZeRO-3, whose
      parameters are empty until gathered, give the list.
    transport: "stream" (over gRPC), or "nccl": broadcasts in a communicator of this process and the workers, which is
      made by the first publish() and made anew when the workers that are well are no longer the same.
    base_version: the manifest holds a part of the tensors; the others must have this version at the workers.
    batch_bytes: sent and acknowledged at once. Host memory: up to three batches (or three tensors, where larger).
    timeout_s: for one publish(), all stages together; rolling back and asking who serves what take half of it again at
      most. With allow_partial Begin must be over after 30% of it, the tensors after 80%, Verify after 90%, asking once
      more who has the update after 95%; one batch (over nccl: making a group, and sending in it what can be sent again)
      may take half of what is left of its stage. Who hangs has failed then, and the others have time to commit.
    retry_s: how long to try to reach a worker again, from when its connection failed. One that is silent (its host is
      gone, its process stopped) fails after 25 s.
    lease_s: how long a worker keeps a half-received update if this process dies; 1 to 3,600, 0: 60. It is renewed every
      third of it until Commit, whatever the other workers take.
    nccl_library: its path; by default LOCKSTEP_NCCL_LIBRARY, the loader's libnccl.so.2, or that of torch's wheel.
    device: from which NCCL sends, as torch names it; by default the current CUDA device. Tensors elsewhere are copied
      there first. "cpu" is for libraries that take host memory.
    max_ctas: thread blocks that a broadcast may take on each GPU: fewer leave more of it to decoding. 0: NCCL's choice.

    token: the workers' control planes' (--control_token_file), sent with every call. tls_ca: a PEM file of the
      authorities that their certificates are checked with; None: no TLS. NCCL's own connections have neither.

    Not for use from several threads at once.
    """

    def __init__(
        self,
        workers: Sequence[str] | str,
        *,
        manifest_from: Any,
        transport: str = "stream",
        base_version: tuple[int, int] | None = None,
        batch_bytes: int = 64 << 20,
        timeout_s: float = 600.0,
        retry_s: float = 10.0,
        lease_s: float = 60.0,
        nccl_library: str | None = None,
        device: str | None = None,
        max_ctas: int = 0,
        token: str | None = None,
        tls_ca: str | pathlib.Path | None = None,
    ):
        if transport not in ("stream", "nccl"):
            raise InvalidRequest(f"transport: {transport!r}, want 'stream' or 'nccl'")
        _check_number("batch_bytes", batch_bytes, 1, _MOST, whole=True)
        _check_number("timeout_s", timeout_s, 0.001, _MOST_S)
        _check_number("retry_s", retry_s, 0, _MOST_S)
        if lease_s != 0:
            _check_number("lease_s", lease_s, 1, 3600, " (0: 60)")
        _check_number("max_ctas", max_ctas, 0, 64, whole=True)
        self._groups = Groups(nccl_library, device, max_ctas) if transport == "nccl" else None
        self.workers = [workers] if isinstance(workers, str) else list(workers)
        if not self.workers or len(set(self.workers)) != len(self.workers):
            raise InvalidRequest(f"workers: {self.workers}, want one or more different HOST:PORT")
        self.manifest = manifest_of(manifest_from)
        self._index = {spec.name: i for i, spec in enumerate(self.manifest)}
        self._base_version = None if base_version is None else _check_version("base_version", base_version)
        self._batch_bytes, self._timeout_s, self._retry_s = batch_bytes, timeout_s, retry_s
        self._lease_s = lease_s or 60.0
        self._credentials = Credentials(token, tls_ca)
        self._channels: dict[str, Any] = {}

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close({worker: self._stub(worker) for worker in self.workers})
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    # What users call

    def publish(
        self,
        version: tuple[int, int],
        tensors: Iterable[tuple[str, Any]] | Callable[[], Iterable[tuple[str, Any]]],
        *,
        policy: str = "recompute",
        finish_timeout_s: float = 0.0,
        fallback: str | None = None,
        allow_partial: bool = False,
        send: bool = True,
    ) -> PublishReport | None:
        """Brings `version` = (epoch, step) to every worker; returns when all of them serve it.

        A worker that serves `version` already, of a publish() before, is sent nothing and keeps what it has, also where
        the tensors are others now; its `served_before` in the report says so. Other tensors need a larger version.

        tensors: (name, torch tensor or numpy array) of every entry of the manifest, in any order; whole tensors
          (an FSDP2 DTensor's full_tensor()). The iterator is walked to its end even if the update has failed before,
          as it may gather over ranks that would hang otherwise.
          stream: each is copied before the next is asked for. nccl: in the manifest's order; none may be written to
          before publish() returns. What has a length (a list, a dict's items) is taken to be there already, what has
          none (a generator) to be gathered on the way.
          A callable that gives such an iterator: over nccl, with allow_partial, an update that broke because a worker
          died is sent again to the others. Not for iterators that other ranks walk too.
        policy: what becomes of samples in flight: "finish" (for finish_timeout_s, then `fallback`), "keep",
          "recompute", "abort". A worker that takes weights in place (--weights_receive=direct) stands still from the
          first bytes on: there "finish" is `fallback` at once.
        allow_partial: go on with the workers that are well; the report tells of the others. Each stage has then a part
          of timeout_s. Otherwise any failure raises UpdateFailed, whose `report` is the same, and before Commit rolls
          back everywhere.
        send: False on all ranks but one: the iterator is walked, nothing is sent, None is returned.
        """
        again = tensors if callable(tensors) else None
        source = tensors() if callable(tensors) else tensors
        iterator = iter(source)
        if not send:
            for _ in iterator:
                pass
            return None
        try:
            commit_request = self._commit_request(version, policy, finish_timeout_s, fallback)
        except BaseException:
            for _ in iterator:
                pass
            raise
        update = _Update(self, commit_request, allow_partial)
        update.at_hand = hasattr(source, "__len__")
        return update.run(iterator, again)

    def commit(
        self,
        version: tuple[int, int],
        *,
        policy: str = "recompute",
        finish_timeout_s: float = 0.0,
        fallback: str | None = None,
    ) -> PublishReport:
        """Commits a verified update again where a publish() failed in Commit (policy "finish" without a fallback)."""
        request = self._commit_request(version, policy, finish_timeout_s, fallback)
        return _Update(self, request, False).commit_only()

    def rollback(self, version: tuple[int, int]) -> dict[str, bool]:
        """Drops the update at every worker; by worker, whether it was open.

        Where not all answered, RollbackFailed has the results of those that did; the others drop it when its lease ends.
        """
        request = weights_pb2.RollbackRequest(version=_version(_check_version("version", version)))
        answers = self._ask_all("Rollback", request)
        results = {w: a if isinstance(a, LockstepError) else a.dropped for w, a in answers.items()}
        errors = [result for result in results.values() if isinstance(result, LockstepError)]
        if errors:
            text = "\n".join(f"  {error}" for error in errors)
            failure = RollbackFailed(f"{len(errors)} of {len(results)} workers failed\n{text}", code=errors[0].code)
            failure.results = results
            raise failure
        return results

    def status(self) -> dict[str, weights_pb2.GetStatusResponse | LockstepError]:
        """Who has which version, and what is open; of a worker that did not answer, its error."""
        return self._ask_all("GetStatus", weights_pb2.GetStatusRequest())

    def digests(self, names: Sequence[str] = ()) -> dict[str, weights_pb2.GetDigestsResponse | LockstepError]:
        """By worker, digests of the weights that serve, in the dtypes in which the worker holds them; or its error."""
        return self._ask_all("GetDigests", weights_pb2.GetDigestsRequest(names=names))

    # Calls

    def _commit_request(
        self, version: tuple[int, int], policy: str, finish_timeout_s: float, fallback: str | None
    ) -> weights_pb2.CommitRequest:
        version = _check_version("version", version)
        if not isinstance(policy, str) or policy not in _POLICIES:
            raise InvalidRequest(f"policy: {policy!r}, want one of {', '.join(_POLICIES)}")
        if fallback not in (None, "keep", "recompute", "abort"):
            raise InvalidRequest(f"fallback: {fallback!r}, want keep, recompute, abort or None")
        _check_number("finish_timeout_s", finish_timeout_s, 0, 3600)
        if policy != "finish" and (fallback is not None or finish_timeout_s):
            raise InvalidRequest(f"policy: {policy!r} takes no finish_timeout_s or fallback, want 'finish' with them")
        return weights_pb2.CommitRequest(
            version=_version(version),
            policy=_POLICIES[policy],
            finish_timeout_ms=round(finish_timeout_s * 1000),
            fallback=_POLICIES[fallback] if fallback else weights_pb2.IN_FLIGHT_POLICY_UNSPECIFIED,
        )

    def _begin_request(self, version: Version) -> weights_pb2.BeginRequest:
        tensors = [weights_pb2.TensorInfo(name=s.name, dtype=_DTYPES[s.dtype], shape=s.shape) for s in self.manifest]
        manifest = weights_pb2.Manifest(tensors=tensors)
        if self._base_version is not None:
            manifest.base_version.CopyFrom(_version(self._base_version))
        return weights_pb2.BeginRequest(
            version=_version(version), manifest=manifest, lease_ms=round(self._lease_s * 1000)
        )

    def _stub(self, worker: str) -> weights_pb2_grpc.WeightsStub:
        if worker not in self._channels:
            self._channels[worker] = self._credentials.channel(worker, _CHANNEL_OPTIONS)
        return weights_pb2_grpc.WeightsStub(self._channels[worker])

    def _call(self, worker: str, method: str, request: Any, deadline: Callable[[], float]) -> Any:
        """A unary call, made again while the connection fails (every call of the service may be repeated).

        deadline: asked before each try; one that has passed ends them.
        """
        give_up = None
        while True:
            try:
                return getattr(self._stub(worker), method)(request, timeout=_left(deadline(), worker))
            except grpc.RpcError as error:
                # From the first failure on: the call may have lasted longer than retry_s itself.
                give_up = give_up or time.monotonic() + self._retry_s
                if error.code() != Code.UNAVAILABLE or time.monotonic() > give_up:
                    raise from_rpc(error, worker) from None
            time.sleep(0.1)

    def _ask_all(self, method: str, request: Any) -> dict[str, Any]:
        """Every worker's answer, or its error: one that is gone keeps none of the others from being asked."""
        deadline = time.monotonic() + self._timeout_s

        def ask(worker: str) -> Any:
            try:
                return self._call(worker, method, request, lambda: deadline)
            except LockstepError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(len(self.workers)) as executor:
            return dict(zip(self.workers, executor.map(ask, self.workers), strict=True))


@dataclasses.dataclass
class _Batch:
    tensors: list[tuple[int, np.ndarray]]  # (index into the manifest, bytes)
    size: int = 0


class _Update:
    """One update: the states of all workers, the threads that send, and the order of the stages."""

    def __init__(
        self,
        publisher: WeightPublisher,
        commit_request: weights_pb2.CommitRequest,
        allow_partial: bool,
    ):
        self.publisher = publisher
        self.version = Version(commit_request.version.epoch, commit_request.version.step)
        self.commit_request, self.allow_partial = commit_request, allow_partial
        self.began = time.monotonic()
        finish = commit_request.finish_timeout_ms / 1000
        self.deadline = self.began + publisher._timeout_s + finish
        self.until = self.deadline  # of the stage under way
        # For Rollback, and at least for the report: past the deadline.
        self.afterwards_s = min(10.0, publisher._timeout_s / 4)
        self.reports = {worker: WorkerReport(worker) for worker in publisher.workers}
        self.chunk_bytes: dict[str, int] = {}
        # Bytes of each tensor, as Begin answered: not 0 where a learner that died had sent them.
        self.received: dict[str, list[int]] = {}
        self.begin_request = publisher._begin_request(self.version)
        # Once the update is over or about to be rolled back: no more bytes, and no Begin, which might open it again.
        self.stopped = threading.Event()
        self.turns = {worker: threading.Lock() for worker in publisher.workers}  # one unary call at a time
        # Workers that had the version before: of a publish() that ended, or whose learner did, within its Commit.
        self.serving: set[str] = set()
        self.rolled_back: dict[str, threading.Thread] = {}
        self.at_hand = False
        self.source_error: Exception | None = None  # the iterator's own, or what is wrong with what it gave

    def run(
        self, tensors: Iterator[tuple[str, Any]], again: Callable[[], Iterable[tuple[str, Any]]] | None
    ) -> PublishReport:
        try:
            with self.kept_open():
                self.stage("begin", lambda worker: self.received.update({worker: self.begin(worker)}))
                self.enter("push")
                if not self.receiving():
                    digests = []
                    for _ in tensors:
                        pass
                elif self.publisher._groups is None:
                    digests = self.push(tensors)
                else:
                    digests = self.broadcast(tensors, again)
                request = weights_pb2.VerifyRequest(version=_version(self.version), digests=digests)
                self.stage("verify", lambda worker: self.call(worker, "Verify", request))
                self.stage("confirm", self.confirm)
            self.commit(roll_back_refused=True)
        except BaseException as error:
            # Whatever it is (the iterator's own error, Ctrl-C): nothing half done stays at the workers.
            if not isinstance(error, UpdateFailed):
                self.roll_back()
            for _ in tensors:  # other ranks are in there as well
                pass
            raise
        finally:
            self.stopped.set()  # also where a second interrupt came before the roll-back
        return self.report()

    def commit_only(self) -> PublishReport:
        self.commit(roll_back_refused=False)  # the caller may yet find the right arguments
        return self.report()

    def well(self) -> list[str]:
        return [worker for worker, report in self.reports.items() if report.error is None]

    def receiving(self) -> list[str]:
        return [worker for worker in self.well() if worker not in self.serving]

    def given_up(self, worker: str) -> bool:
        return self.stopped.is_set() or worker in self.rolled_back

    def call(self, worker: str, method: str, request: Any, until: float | None = None) -> Any:
        """One at a time at a worker; none is begun once the update is given up there."""
        until = self.until if until is None else until
        if not self.turns[worker].acquire(timeout=_left(until, worker)):
            raise _late(worker)
        try:
            return self.publisher._call(worker, method, request, lambda: 0.0 if self.given_up(worker) else until)
        finally:
            self.turns[worker].release()

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Renews the leases meanwhile: a worker that is done with a stage waits for the slowest."""
        interval_s, over = self.publisher._lease_s / 3, threading.Event()

        def renew(worker: str) -> None:
            turn = self.turns[worker]
            if not turn.acquire(blocking=False):  # busy: the call that it is busy with renews
                return
            if self.given_up(worker):
                turn.release()
                return
            # Its answer is of no interest: where the update is lost, the next call says so, confirm() at the latest.
            call = self.publisher._stub(worker).Begin.future(self.begin_request, timeout=min(interval_s, 10.0))
            call.add_done_callback(lambda _: turn.release())

        def renew_all() -> None:
            while not over.wait(interval_s) and not self.stopped.is_set():
                for worker in self.receiving():
                    if worker in self.received:
                        renew(worker)

        thread = threading.Thread(target=renew_all, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def confirm(self, worker: str) -> None:
        """Begin once more: an update that the worker has lost since Verify fails before anybody commits."""
        if self.begin(worker) != [spec.bytes for spec in self.publisher.manifest]:
            raise LockstepError(
                f"the worker lost the update before Commit: it was restarted, or its lease of {self.publisher._lease_s} s "
                "ended",
                worker=worker,
            )

    def enter(self, stage: str) -> None:
        self.until = self.deadline
        if self.allow_partial and stage in _STAGE_ENDS:
            self.until = self.began + self.publisher._timeout_s * _STAGE_ENDS[stage]

    def share(self) -> float:
        """Until when one step of a stage may last: where the others go on without who hangs in it, half of the rest."""
        now = time.monotonic()
        return now + (self.until - now) / 2 if self.allow_partial else self.until

    def stage(self, name: str, action: Callable[[str], Any]) -> None:
        """`action` for every well worker at once; then, unless a part is enough, all must be well."""
        self.enter(name)

        def one(worker: str) -> None:
            began = time.monotonic()
            try:
                action(worker)
            except LockstepError as error:
                self.reports[worker].error, self.reports[worker].failed_in = error, name
            setattr(self.reports[worker], f"{name}_s", time.monotonic() - began)

        with concurrent.futures.ThreadPoolExecutor(len(self.reports)) as executor:
            list(executor.map(one, self.receiving() if name in ("verify", "confirm") else self.well()))
        self.check(roll_back=name != "commit")

    def failed(self) -> list[WorkerReport]:
        return [report for report in self.reports.values() if report.error is not None]

    def hopeless(self) -> bool:
        return bool(self.failed()) and not (self.allow_partial and self.well())

    def check(self, roll_back: bool) -> None:
        failed = self.failed()
        if not failed:
            return
        if not self.hopeless():
            # One that lives would hold what had arrived, and in direct mode its samples, until the lease ends. The
            # others do not wait for one that may hang.
            if roll_back:
                self.roll_back([report.worker for report in failed], wait=False)
            return
        if roll_back:
            self.roll_back()
        report = self.report()
        error = UpdateFailed(
            f"{len(failed)} of {len(self.reports)} workers failed\n{report}", code=failed[0].error.code
        )
        error.report = report
        raise error

    def roll_back(self, workers: Sequence[str] | None = None, wait: bool = True) -> None:
        """At those, once; by default everywhere, the failed ones included: one may have carried out what it could not
        answer.
        """
        if workers is None:
            self.stopped.set()
        workers = [w for w in (self.reports if workers is None else workers) if w not in self.rolled_back]
        request = weights_pb2.RollbackRequest(version=_version(self.version))

        def one(worker: str) -> None:
            until = time.monotonic() + self.afterwards_s
            # A Begin that is on its way would open it again.
            had_turn = self.turns[worker].acquire(timeout=self.afterwards_s / 2)
            try:
                self.publisher._stub(worker).Rollback(request, timeout=until - time.monotonic())
            except grpc.RpcError:
                pass  # the lease ends it there
            finally:
                if had_turn:
                    self.turns[worker].release()

        for worker in workers:
            self.rolled_back[worker] = threading.Thread(target=one, args=(worker,), daemon=True)
            self.rolled_back[worker].start()
        if wait:
            self.await_rollbacks()

    def await_rollbacks(self) -> None:
        for thread in self.rolled_back.values():
            thread.join()

    def report(self) -> PublishReport:
        def ask(worker: str) -> None:
            # One that has done all it was asked for may stand still for a moment like any other.
            left = self.until - time.monotonic() if self.reports[worker].error is None else 0.0
            try:
                stub = self.publisher._stub(worker)
                status = stub.GetStatus(weights_pb2.GetStatusRequest(), timeout=max(self.afterwards_s, left))
                self.reports[worker].version = Version(status.weight_version.epoch, status.weight_version.step)
            except grpc.RpcError:
                self.reports[worker].version = None

        self.await_rollbacks()
        with concurrent.futures.ThreadPoolExecutor(len(self.reports)) as executor:
            list(executor.map(ask, self.reports))
        specs = self.publisher.manifest
        size = sum(spec.bytes for spec in specs)
        seconds = time.monotonic() - self.began
        return PublishReport(self.version, list(self.reports.values()), len(specs), size, seconds)

    def begin(self, worker: str, until: float | None = None) -> list[int]:
        """Opens or renews the update; bytes received so far, by index. All, where the version serves already."""
        while True:
            try:
                answer = self.call(worker, "Begin", self.begin_request, until)
                break
            except LockstepError as error:
                if error.code != Code.FAILED_PRECONDITION:
                    raise
                status = self.call(worker, "GetStatus", weights_pb2.GetStatusRequest(), until)
                if status.weight_version == _version(self.version):
                    self.serving.add(worker)
                    self.reports[worker].served_before = worker not in self.received
                    return [spec.bytes for spec in self.publisher.manifest]
                # A Commit whose learner is gone: what comes of it shows soon.
                committing = status.state == weights_pb2.UPDATE_STATE_COMMITTING
                if not committing or status.open_version != _version(self.version):
                    raise
            time.sleep(0.1)
        self.chunk_bytes[worker] = answer.max_chunk_bytes or 1 << 20
        return list(answer.received_bytes)

    def commit(self, roll_back_refused: bool) -> None:
        def one(worker: str) -> None:
            try:
                answer, report = self.call(worker, "Commit", self.commit_request), self.reports[worker]
            except LockstepError as error:
                # No Commit like it will do; in direct mode its samples would stand still until the lease ends.
                if roll_back_refused and error.code in _REFUSED:
                    self.roll_back([worker], wait=False)
                raise
            report.pause_ms, report.wait_ms = answer.pause_ms, answer.wait_ms
            report.kept, report.recomputed, report.aborted = answer.kept, answer.recomputed, answer.aborted

        self.stage("commit", one)
        # A worker may have died after its answer, and come back with its checkpoint's weights.
        for report in self.report().workers:
            if report.error is None and report.version != self.version:
                serves = f"serves {tuple(report.version)}" if report.version else "gives no version"
                report.error = WorkerUnavailable(f"it {serves} after its Commit was answered", worker=report.worker)
                report.failed_in = "commit"
        self.check(roll_back=False)

    # Sending

    def broadcast(
        self, tensors: Iterator[tuple[str, Any]], again: Callable[[], Iterable[tuple[str, Any]]] | None
    ) -> list[int]:
        """Sends every tensor to every well worker over NCCL; digests by index."""
        groups, began = self.publisher._groups, time.monotonic()
        assert groups is not None
        memory = groups.memory(len(self.publisher.manifest))
        while (broadcast := self.begin_broadcast(groups, memory, repeatable=again is not None)) is not None:
            try:
                digests = broadcast.send(self.in_order(tensors), self.at_hand)
                for worker in self.receiving():
                    self.reports[worker].push_s = time.monotonic() - began
                return digests
            except LockstepError as error:
                if self.source_error is not None:
                    raise self.source_error from None
                groups.drop()
                self.mark_dead(broadcast.errors(), error)
                self.check(roll_back=True)
                for _ in tensors:
                    pass
                if again is None:  # what is left of the update can go to nobody
                    self.mark(dict.fromkeys(self.receiving(), error))
                    self.check(roll_back=True)
                elif self.receiving():
                    tensors, memory = iter(again()), groups.memory(len(self.publisher.manifest))
        for _ in tensors:
            pass
        return []

    def begin_broadcast(self, groups: Groups, memory: HostMemory | CudaMemory, repeatable: bool) -> Broadcast | None:
        """In which every worker that still receives is ready; None: none does. repeatable: another may follow it."""
        sizes = [spec.bytes for spec in self.publisher.manifest]
        rounds = 0
        while workers := self.receiving():
            stubs = {worker: self.publisher._stub(worker) for worker in workers}
            group, errors = groups.current(workers), {}
            fresh = group is None
            if group is None:
                with memory.use():
                    group, errors = groups.make(stubs, self.share())
            if group is not None:
                until = self.share() if repeatable else self.until
                broadcast = Broadcast(
                    group, stubs, _version(self.version), sizes, memory, until, self.publisher._lease_s / 3
                )
                errors = broadcast.begin()
                if not errors:
                    return broadcast
            groups.drop()
            late = time.monotonic() >= self.until
            if fresh or late:  # an old one may be one that a worker has lost, by a restart
                rounds += 1
                self.mark_guilty(errors, last=late or rounds == _GROUP_ROUNDS)
                self.check(roll_back=True)
        return None

    def mark(self, errors: dict[str, LockstepError]) -> None:
        for worker, error in errors.items():
            self.reports[worker].error, self.reports[worker].failed_in = error, "push"

    def mark_dead(self, errors: dict[str, LockstepError], error: LockstepError) -> None:
        """Of a broken broadcast: the workers that have lost the update. If none has, all fail with `error`."""
        self.mark({worker: errors.get(worker, error) for worker in self.lost() or self.receiving()})

    def mark_guilty(self, errors: dict[str, LockstepError], last: bool) -> None:
        """Of a group that did not come together: the workers that refuse, and those that have lost the update. Others
        may have failed because of these; they are tried again, unless that was the `last` time.
        """
        first = next(iter(errors.values()))
        guilty = {w: error for w, error in errors.items() if last or error.code not in _ANOTHERS}
        self.mark({worker: errors.get(worker, first) for worker in self.lost()} | guilty)

    def lost(self) -> list[str]:
        """The workers that should have the update open and do not, or cannot be asked."""
        timeout = min(self.afterwards_s, max(1.0, self.share() - time.monotonic()))

        def is_lost(worker: str) -> bool:
            try:
                stub = self.publisher._stub(worker)
                status = stub.GetStatus(weights_pb2.GetStatusRequest(), timeout=timeout)
            except grpc.RpcError:
                return True
            receiving = status.state in (weights_pb2.UPDATE_STATE_RECEIVING, weights_pb2.UPDATE_STATE_VERIFIED)
            return not receiving or status.open_version != _version(self.version)

        workers = self.receiving()
        with concurrent.futures.ThreadPoolExecutor(len(workers)) as executor:
            return [worker for worker, lost in zip(workers, executor.map(is_lost, workers), strict=True) if lost]

    def in_order(self, tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[int, Any]]:
        """With their indices, which must be those of the manifest's order."""
        manifest = self.publisher.manifest
        seen: dict[int, int] = {}
        try:
            for item in tensors:
                index, tensor = self.check_tensor(item, seen)
                if index != len(seen):
                    raise InvalidRequest(
                        f"tensors: {item[0]!r} came where the manifest has {manifest[len(seen)].name!r}; over nccl they "
                        "come in the manifest's order"
                    )
                seen[index] = 0
                yield index, tensor
            self.check_complete(seen)
        except Exception as error:
            self.source_error = error
            raise

    def push(self, tensors: Iterator[tuple[str, Any]]) -> list[int]:
        """Sends every tensor to every well worker; digests by index."""
        queues: dict[str, queue.Queue[_Batch | None]] = {worker: queue.Queue(maxsize=1) for worker in self.receiving()}
        threads = [threading.Thread(target=self.sender, args=(w, queues[w]), daemon=True) for w in queues]
        digests: dict[int, int] = {}
        batch = _Batch([])

        def hand_over(item: _Batch | None) -> None:
            for worker, waiting in queues.items():
                # A failed sender still waits for its None.
                while (self.reports[worker].error is None or item is None) and not self.hopeless():
                    try:
                        waiting.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue

        # Whatever is raised here, an interrupt too, ends in a roll-back, which stops the threads.
        for thread in threads:
            thread.start()
        for item in tensors:
            if self.hopeless():
                break
            index, tensor = self.check_tensor(item, digests)
            digests[index] = digest(tensor)
            data = _host_copy(tensor)
            batch.tensors.append((index, data))
            batch.size += data.size
            if batch.size >= self.publisher._batch_bytes:
                hand_over(batch)
                batch = _Batch([])
        else:
            if batch.tensors:
                hand_over(batch)
            self.check_complete(digests)
        hand_over(None)
        for thread in threads:
            while thread.is_alive() and not self.hopeless():
                thread.join(0.2)
        self.check(roll_back=True)
        return [digests[i] for i in range(len(self.publisher.manifest))]

    def check_tensor(self, item: Any, seen: dict[int, int]) -> tuple[int, Any]:
        """The tensor and its index; item: what the iterator gave."""
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
            raise InvalidRequest(f"tensors: the iterator gave {_shown(item)}, want (name, tensor)")
        name, tensor = item
        index = self.publisher._index.get(name)
        if index is None:
            raise InvalidRequest(f"tensors: {name!r} is not in the manifest")
        if index in seen:
            raise InvalidRequest(f"tensors: {name!r} came twice")
        if hasattr(tensor, "full_tensor"):
            raise InvalidRequest(f"tensors: {name!r} is a DTensor, want its full_tensor() (gathered on every rank)")
        if not isinstance(tensor, np.ndarray) and not hasattr(tensor, "detach"):
            raise InvalidRequest(f"tensors: {name!r} is {_shown(tensor)}, want a torch tensor or a numpy array")
        spec = self.publisher.manifest[index]
        got = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if got != (spec.dtype, spec.shape):
            raise InvalidRequest(f"tensors: {name!r} is {got[0]} {got[1]}, the manifest says {spec.dtype} {spec.shape}")
        return index, tensor

    def check_complete(self, seen: dict[int, int]) -> None:
        missing = [spec.name for i, spec in enumerate(self.publisher.manifest) if i not in seen]
        if missing:
            raise InvalidRequest(f"tensors: {len(missing)} of the manifest never came: {', '.join(missing[:10])}")

    def sender(self, worker: str, batches: queue.Queue[_Batch | None]) -> None:
        """One worker's thread: pushes batch after batch until None comes or the update is stopped."""
        report, began = self.reports[worker], time.monotonic()
        while not self.stopped.is_set():
            try:
                batch = batches.get(timeout=0.2)
            except queue.Empty:
                continue
            if batch is None:
                break
            if report.error is None:
                self.guarded(worker, lambda batch=batch: self.push_batch(worker, batch))
        report.push_s = time.monotonic() - began

    def guarded(self, worker: str, action: Callable[[], Any]) -> None:
        try:
            action()
            return
        except LockstepError as caught:
            error = caught
        except Exception as caught:  # a defect here must not leave the other threads waiting
            error = LockstepError(f"{type(caught).__name__}: {caught}", worker=worker)
        if not self.stopped.is_set():  # else it comes of that
            self.reports[worker].error, self.reports[worker].failed_in = error, "push"

    def push_batch(self, worker: str, batch: _Batch) -> None:
        """One stream for one batch, taken up where it broke until all of it has arrived."""
        received = {index: self.received[worker][index] for index, _ in batch.tensors}
        until, give_up = self.share(), None
        while True:
            try:
                timeout = _left(until, worker)
                messages = self.messages(worker, batch, received)
                answer = self.publisher._stub(worker).Push(messages, timeout=timeout)
                now = {index: answer.received_bytes[index] for index in received}
                if any(now[index] != data.size for index, data in batch.tensors):
                    raise LockstepError(f"Push ended well with {now} bytes received", worker=worker)
                return
            except grpc.RpcError as error:
                if error.code() not in (Code.UNAVAILABLE, Code.CANCELLED, Code.UNKNOWN):
                    raise from_rpc(error, worker) from None
                progress = self.begin(worker, until)  # waits for the connection
                now = {index: progress[index] for index in received}
                if any(now[index] < received[index] for index in received):
                    raise LockstepError(
                        "the worker lost what it had received", code=error.code(), worker=worker
                    ) from None
                if now != received or give_up is None:
                    give_up = time.monotonic() + self.publisher._retry_s
                elif time.monotonic() > give_up:
                    raise from_rpc(error, worker) from None
                received = now
                self.reports[worker].resumed += 1

    def messages(self, worker: str, batch: _Batch, received: dict[int, int]) -> Iterator[weights_pb2.PushRequest]:
        chunk = self.chunk_bytes[worker] // 4 * 4  # whole values of every dtype
        first = weights_pb2.PushRequest(version=_version(self.version))
        for index, data in batch.tensors:
            for offset in range(received[index], data.size, chunk):
                if self.stopped.is_set():
                    return
                message, first = first or weights_pb2.PushRequest(), None
                message.tensor, message.offset = index, offset
                message.data = data[offset : offset + chunk].tobytes()
                yield message
        if first is not None:  # all had arrived; only the answer was lost
            yield first


def _shown(value: Any) -> str:
    """Its type, and what fits of it into a line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:80] + '...'}"


def _check_number(name: str, value: Any, least: float, most: float, more: str = "", *, whole: bool = False) -> None:
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or not least <= value <= most:
        raise InvalidRequest(f"{name}: {value!r}, want a {'whole ' * whole}number from {least:,} to {most:,}{more}")


def _check_version(name: str, version: Any) -> tuple[int, int]:
    try:
        epoch, step = map(operator.index, version)
    except (TypeError, ValueError):
        epoch = step = -1
    if not (0 <= epoch <= _MOST and 0 <= step <= _MOST):
        raise InvalidRequest(f"{name}: {version!r}, want (epoch, step), whole numbers from 0 to {_MOST:,}")
    return epoch, step


def _version(version: tuple[int, int]) -> rollout_pb2.WeightVersion:
    return rollout_pb2.WeightVersion(epoch=version[0], step=version[1])


def _left(deadline: float, worker: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _late(worker)
    return left


def _late(worker: str) -> DeadlineExceeded:
    return DeadlineExceeded("timeout_s, or a stage's part of it, passed", code=Code.DEADLINE_EXCEEDED, worker=worker)


def _host_copy(tensor: Any) -> np.ndarray:
    """The tensor's bytes in row-major order, uint8 [bytes]: a copy of its own."""
    if isinstance(tensor, np.ndarray):
        return np.array(tensor, order="C", copy=True).reshape(-1).view(np.uint8)
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (flat.cpu() if flat.device.type != "cpu" else flat.clone()).numpy()

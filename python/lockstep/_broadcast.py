"""The way of tensors over NCCL: a group of this process and the workers, and one update's broadcasts in it.

A worker enters a broadcast only once this side has said that it is about to begin it (a waiting one would hold
multiprocessors that decode). The call on which it says so stays open meanwhile and ends when either side dies, so
neither waits for a dead peer inside NCCL.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc

from lockstep.v1 import rollout_pb2, weights_pb2, weights_pb2_grpc

from ._buckets import plan_buckets
from ._memory import CudaMemory, HostMemory
from ._nccl import Communicator, NcclLibrary
from .errors import DeadlineExceeded, LockstepError, NcclError, from_rpc

Code = grpc.StatusCode
_ROOT = 0
_NAME = "learner"  # of the group, at the workers


class Group:
    """One communicator: this process, rank 0, and workers."""

    def __init__(self, generation: int, workers: Sequence[str], comm: Communicator, bucket_bytes: int):
        self.generation, self.workers = generation, tuple(workers)
        self.comm, self.bucket_bytes = comm, bucket_bytes


class Groups:
    """Makes a group of whichever workers there are; a later one replaces it."""

    def __init__(self, library: str | None, device: str | None, max_ctas: int):
        self.library = NcclLibrary.load(library)
        self.device, self.max_ctas = device, max_ctas
        self._generation = 0
        self._group: Group | None = None

    def memory(self, tensors: int) -> HostMemory | CudaMemory:
        return HostMemory(tensors) if self.device == "cpu" else CudaMemory(tensors, self.device or "cuda")

    def _use_device(self) -> contextlib.AbstractContextManager[Any]:
        if self.device == "cpu":
            return contextlib.nullcontext()
        import torch

        return torch.cuda.device(self.device or torch.cuda.current_device())

    def current(self, workers: Sequence[str]) -> Group | None:
        """The group of exactly these workers, if it is well."""
        group = self._group
        return group if group and group.comm.healthy and group.workers == tuple(workers) else None

    def make(
        self, stubs: dict[str, weights_pb2_grpc.WeightsStub], deadline: float
    ) -> tuple[Group | None, dict[str, LockstepError]]:
        """A new group of all of them. Or None, and the workers that failed, with their errors."""
        self.drop()
        # A learner that was restarted replaces what its predecessor left at the workers.
        self._generation = max(self._generation + 1, int(time.time() * 1000))
        unique_id = self.library.unique_id()
        workers = list(stubs)
        timeout = max(1.0, min(deadline - time.monotonic(), 600.0))
        calls = {}
        for rank, worker in enumerate(workers, start=1):
            request = weights_pb2.JoinRequest(
                group=_NAME,
                generation=self._generation,
                nranks=len(workers) + 1,
                rank=rank,
                root=_ROOT,
                unique_id=unique_id,
                timeout_ms=round(timeout * 1000),
                max_ctas=self.max_ctas,
            )
            calls[worker] = stubs[worker].Join.future(request, timeout=timeout)

        def any_failed() -> bool:
            return any(call.done() and call.code() != Code.OK for call in calls.values())

        comm, ours, errors = None, None, {}
        try:
            comm = Communicator(
                self.library,
                unique_id,
                len(workers) + 1,
                _ROOT,
                timeout,
                max_ctas=self.max_ctas,
                cancelled=any_failed,
            )
            bucket_bytes = min(call.result().bucket_bytes for call in calls.values())
        except (LockstepError, grpc.RpcError) as error:
            ours = error
        except BaseException:  # an interrupt: nobody else has the communicator
            for call in calls.values():
                call.cancel()
            if comm is not None:
                comm.abort()
            raise
        if comm is not None and ours is None:
            self._group = Group(self._generation, workers, comm, bucket_bytes)
            return self._group, {}
        if comm is not None:
            comm.abort()
        # Those that failed by themselves: the others only because these did.
        for worker, call in calls.items():
            if call.done() and call.code() not in (Code.OK, Code.CANCELLED):
                errors[worker] = from_rpc(call, worker)
            call.cancel()
        return None, errors or {worker: ours for worker in workers}

    def drop(self) -> None:
        if self._group is not None:
            self._group.comm.abort()
            self._group = None

    def close(self, stubs: dict[str, weights_pb2_grpc.WeightsStub]) -> None:
        """Ends the communicator on both sides; a worker that is gone costs two seconds."""
        group, self._group = self._group, None
        if group is None:
            return

        def leave(worker: str) -> None:
            try:
                stubs[worker].Leave(weights_pb2.LeaveRequest(group=_NAME), timeout=2)
            except grpc.RpcError:
                pass

        with concurrent.futures.ThreadPoolExecutor(len(group.workers)) as executor:
            calls = [executor.submit(leave, worker) for worker in group.workers]
            with self._use_device():
                group.comm.close()
            concurrent.futures.wait(calls)


class _Receiving:
    """One worker's Receive call."""

    def __init__(
        self,
        worker: str,
        stub: weights_pb2_grpc.WeightsStub,
        first: weights_pb2.ReceiveRequest,
        timeout: float,
        renew_s: float,
        changed: Callable[[], None],
    ):
        self.worker = worker
        self.buckets: int | None = None  # once the worker could begin
        self.ended = False
        self._cancelled = False
        self.error: LockstepError | None = None
        self._first, self._renew_s, self._changed = first, renew_s, changed
        self._announced: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._call = stub.Receive(self._requests(), timeout=timeout)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def announce(self, buckets: int) -> None:
        self._announced.put(buckets)

    def no_more(self) -> None:
        self._announced.put(None)

    def cancel(self) -> None:
        """Its end is no error then."""
        self._cancelled = True
        self.no_more()
        self._call.cancel()

    def join(self) -> None:
        self._thread.join()

    def _requests(self) -> Iterator[weights_pb2.ReceiveRequest]:
        yield self._first
        ready = 0
        while True:
            try:
                item = self._announced.get(timeout=self._renew_s)
            except queue.Empty:
                item = ready  # renews the lease
            if item is None:
                return
            ready = item
            yield weights_pb2.ReceiveRequest(ready_buckets=ready)

    def _read(self) -> None:
        try:
            for response in self._call:
                self.buckets = response.buckets
                self._changed()
        except grpc.RpcError as error:
            if not self._cancelled:
                self.error = from_rpc(error, self.worker)
        self.ended = True
        self._announced.put(None)
        self._changed()


class Broadcast:
    """One update's tensors to the workers of a group. A failure anywhere ends the group."""

    def __init__(
        self,
        group: Group,
        stubs: dict[str, weights_pb2_grpc.WeightsStub],
        version: rollout_pb2.WeightVersion,
        sizes: Sequence[int],
        memory: HostMemory | CudaMemory,
        deadline: float,
        renew_s: float,
    ):
        self._group, self._memory, self._deadline = group, memory, deadline
        self._plan = plan_buckets(sizes, group.bucket_bytes)
        self._condition = threading.Condition()
        self._receiving: list[_Receiving] = []
        first = weights_pb2.ReceiveRequest(
            version=version, group=_NAME, generation=group.generation, bucket_bytes=group.bucket_bytes
        )
        timeout = max(0.0, deadline - time.monotonic())
        for worker in group.workers:
            self._receiving.append(_Receiving(worker, stubs[worker], first, timeout, renew_s, self._notify))

    def _notify(self) -> None:
        with self._condition:
            self._condition.notify_all()
        if self.errors():
            self._group.comm.cancel()

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        """Until it is done or a worker's call has failed."""
        with self._condition:
            while not done() and not self.errors():
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"timeout_s, or a stage's part of it, passed while waiting for {what}")
                self._condition.wait(min(left, 1.0))

    def errors(self) -> dict[str, LockstepError]:
        return {r.worker: r.error for r in self._receiving if r.error is not None}

    def begin(self) -> dict[str, LockstepError]:
        """Waits until every worker could enter the first broadcast; errors of those that cannot, or are late."""
        late = {}
        try:
            self._wait(
                lambda: all(r.buckets is not None or r.ended for r in self._receiving), "the workers to be ready"
            )
        except DeadlineExceeded as error:
            late = {r.worker: error for r in self._receiving if r.buckets is None and not r.ended}
        except BaseException:
            self.abort()
            raise
        errors = late | self.errors()
        for r in self._receiving:
            if r.buckets is not None and r.buckets != len(self._plan):
                text = f"the worker plans {r.buckets} buckets, this side {len(self._plan)}"
                errors.setdefault(r.worker, LockstepError(text, worker=r.worker))
        if errors:
            self.abort()
        return errors

    def send(self, tensors: Iterable[tuple[int, Any]], at_hand: bool) -> list[int]:
        """tensors: (index, tensor) of all, in the manifest's order. Digests by index, once all workers have all.

        at_hand: they are there already, nothing is gathered while the iterator is walked.

        Raises what the iterator raises, a LockstepError of NCCL or of the deadline, or that of the first worker to fail.
        """
        try:
            with self._memory.use():
                self._send(tensors, at_hand)
                digests = self._memory.digests()
            for receiving in self._receiving:
                receiving.no_more()
            self._wait(lambda: all(r.ended for r in self._receiving), "the workers to have received all")
            self._raise_worker_error()
        except NcclError:
            self.abort()
            # Where the communicator was ended because of a worker, the worker's error says why.
            self._raise_worker_error()
            raise
        except BaseException:
            self.abort()
            raise
        return digests

    def _raise_worker_error(self) -> None:
        for error in self.errors().values():
            if error.code != Code.CANCELLED:
                raise error

    def _send(self, tensors: Iterable[tuple[int, Any]], at_hand: bool) -> None:
        comm, memory = self._group.comm, self._memory
        bucket = at = 0  # what the next piece is
        pieces: list[tuple[int, int]] = []
        kept: list[Any] = []  # whose bytes the pieces are
        fresh: list[tuple[int, Any]] = []  # of those, the ones that came since the last bucket
        if at_hand:
            self._announce(len(self._plan))
        for index, tensor in tensors:
            address, keeper = memory.take(tensor)
            kept.append(keeper)
            fresh.append((index, keeper))
            while bucket < len(self._plan) and self._plan[bucket][at].tensor == index:
                piece = self._plan[bucket][at]
                pieces.append((address + piece.tensor_offset, piece.bytes))
                at += 1
                if at < len(self._plan[bucket]):
                    continue
                bucket, at = bucket + 1, 0
                memory.ready(fresh)
                if not at_hand:
                    self._announce(bucket)
                comm.broadcast(pieces, _ROOT, memory.stream, self._left())
                memory.hold(kept)
                pieces, kept, fresh = [], [keeper], []
        memory.ready(fresh)
        comm.wait(memory.idle, "the last bytes", self._left())

    def _announce(self, buckets: int) -> None:
        for receiving in self._receiving:
            receiving.announce(buckets)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def abort(self) -> None:
        # First, or the workers would fail because of the communicator, which says nothing of them.
        for receiving in self._receiving:
            receiving.cancel()
        self._group.comm.abort()
        for receiving in self._receiving:
            receiving.join()

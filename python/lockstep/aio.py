"""RolloutClient for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.v1 import rollout_pb2 as pb
from lockstep.v1 import rollout_pb2_grpc

from ._assembly import Assembly
from ._channel import LIVENESS_OPTIONS, Credentials
from ._pool import Pool, WorkerState
from ._progress import Progress
from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    LockstepError,
    NotAuthenticated,
    WorkerDefect,
    WorkerUnavailable,
    from_rpc,
    retry_after_s,
    too_large,
)
from .rollouts import Rollouts
from .sampling import SamplingParams, logprob_kinds

T = TypeVar("T")
Code = grpc.StatusCode
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.enable_retries", 0),  # retries are this client's: gRPC's own could run a request twice
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    *LIVENESS_OPTIONS,
]
_BROKEN = (Code.UNAVAILABLE, Code.CANCELLED, Code.RESOURCE_EXHAUSTED, Code.UNKNOWN)
_LOST = (Code.NOT_FOUND, Code.OUT_OF_RANGE, *_BROKEN)
_CHECK_S = 5.0  # how long a worker may take to answer a health check
_MISSED_CHECKS = 3  # in a row: then its streams are not waited for any more
_ABORT_S = 300.0  # how long a worker that is away is waited for, to free what it may still run
_CLOSE_S = 5.0  # and how long by close()
_NOT_TAKEN = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
HEALTH_SERVICE = "lockstep.v1.Rollout"


class _Lost(Exception):
    """A stream is gone for good; its unfinished samples need another request."""

    def __init__(self, error: LockstepError):
        self.error = error


class RolloutClient:
    """Generates and scores over any number of workers.

        async with RolloutClient(["host1:50051", "host2:50051"]) as client:
            rollouts = await client.generate(prompts, SamplingParams(max_tokens=256), n=8)

    workers: HOST:PORT of the workers' data planes. They must serve the same model; under which weights each token was
      computed is in its version spans.
    timeout: seconds for one call (generate, score), the default of their `timeout`.
    connect_timeout: seconds in which one worker at least must be healthy.
    max_in_flight: requests at one time for each worker; further ones wait here, so that a faster worker gets more.
    on_loss: what becomes of samples of a worker that is lost for good. "regenerate": from scratch with the same seed.
      "continue": from the tokens that had arrived, but for the last of each sample, which is drawn again (it may have
      ended it); their version spans are None unless the worker still told them.
    reattach_s: how long to try to read a broken stream again at the same worker before its samples count as lost.
    health_interval: seconds between two health checks. A worker that does not answer three in a row is lost.

    token: the workers' (--token_file), sent with every call. tls_ca: a PEM file of the authorities that their
      certificates are checked with; None: no TLS.

    A stream that breaks is read on from where it broke (Generate's `attach`), so no token is counted twice or lost.
    One event loop; close it (or leave the `async with`) on the loop it was used on.
    """

    def __init__(
        self,
        workers: Sequence[str] | str,
        *,
        timeout: float = 3600.0,
        connect_timeout: float = 60.0,
        max_in_flight: int = 256,
        on_loss: str = "regenerate",
        reattach_s: float = 3.0,
        health_interval: float = 5.0,
        token: str | None = None,
        tls_ca: str | pathlib.Path | None = None,
    ):
        if on_loss not in ("regenerate", "continue"):
            raise InvalidRequest(f"on_loss: {on_loss!r}, want 'regenerate' or 'continue'")
        self._pool = Pool(workers)
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._max_in_flight, self._on_loss, self._reattach_s = max_in_flight, on_loss, reattach_s
        self._health_interval = health_interval
        self._credentials = Credentials(token, tls_ca)
        self._channels: dict[str, Any] = {}
        self._stubs: dict[str, Any] = {}
        self._health_task: asyncio.Task | None = None
        self._open: dict[str, str] = {}  # requests that a worker may run: its address by request_id
        self._aborts: set[asyncio.Task] = set()
        self._closed = False

    async def __aenter__(self) -> RolloutClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections; calls in progress fail, and what they run at the workers is aborted (5 s are waited)."""
        self._closed = True
        if self._health_task is not None:
            self._health_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_task
            self._health_task = None
        for worker in self._pool.workers:
            worker.stop_reading()
        for request_id in list(self._open):
            self._abort_later(request_id)
        if self._aborts:
            _, late = await asyncio.wait(set(self._aborts), timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()

    # Workers

    def _stub(self, address: str) -> Any:
        if address not in self._stubs:
            self._channels[address] = self._credentials.aio_channel(address, _CHANNEL_OPTIONS)
            self._stubs[address] = rollout_pb2_grpc.RolloutStub(self._channels[address])
        return self._stubs[address]

    async def _check(self, worker: WorkerState) -> bool:
        """Asks how a worker is. False: no answer in time."""
        stub = self._stub(worker.address)
        health = health_pb2_grpc.HealthStub(self._channels[worker.address])
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=HEALTH_SERVICE), timeout=_CHECK_S)
            worker.healthy = answer.status == health_pb2.HealthCheckResponse.SERVING
            worker.last_error = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            load = await stub.GetLoad(pb.GetLoadRequest(), timeout=_CHECK_S)
            worker.reported = load.running_sequences + load.waiting_sequences
            worker.denied = ""
        except grpc.RpcError as error:
            worker.healthy = False
            worker.last_error = f"{error.code().name}: {error.details()}"
            denied = error.code() == Code.UNAUTHENTICATED
            worker.denied = error.details() if denied else ""
            return error.code() != Code.DEADLINE_EXCEEDED
        return True

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._health_interval)
            answers = await asyncio.gather(*(self._check(worker) for worker in self._pool.workers))
            for worker, answered in zip(self._pool.workers, answers, strict=True):
                worker.missed_checks = 0 if answered else worker.missed_checks + 1
                if worker.missed_checks >= _MISSED_CHECKS:
                    worker.stop_reading()

    async def _while_answering(self, worker: WorkerState, reading: Coroutine[Any, Any, T]) -> T:
        """What `reading`, of a worker's streams, returns. Raises _Lost once that worker has stopped answering."""
        task = asyncio.ensure_future(reading)
        worker.readers.add(task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        finally:
            worker.readers.discard(task)
        if task.cancelled():
            text = f"no answer to {worker.missed_checks} health checks: {worker.last_error}"
            raise _Lost(WorkerUnavailable(text, code=Code.UNAVAILABLE, worker=worker.address))
        return task.result()

    async def _worker(
        self, deadline: float, session_id: str, exclude: Sequence[str], last: grpc.RpcError | None
    ) -> WorkerState:
        """A fit worker; waits for one for connect_timeout at most. last: why the one in `exclude` did not take it."""
        if self._health_task is None:
            self._health_task = asyncio.create_task(self._watch_health())
        give_up = time.monotonic() + self._connect_timeout
        while True:
            if self._closed:
                raise LockstepError("the client is closed")
            _left(deadline, last, exclude[0] if exclude else None)
            worker = self._pool.pick(session_id, exclude)
            if worker is not None:
                return worker
            if not any(w.healthy for w in self._pool.workers):
                await asyncio.gather(*(self._check(w) for w in self._pool.workers))
                if any(w.healthy for w in self._pool.workers):
                    continue
                for worker in self._pool.workers:
                    if worker.denied:  # asking again would not help
                        raise NotAuthenticated(worker.denied, code=Code.UNAUTHENTICATED, worker=worker.address)
                if time.monotonic() > give_up:
                    raise WorkerUnavailable(f"no worker is healthy: {self._pool.describe()}", code=Code.UNAVAILABLE)
            await asyncio.sleep(0.1)

    async def info(self) -> dict[str, pb.GetInfoResponse]:
        """GetInfo of every worker, by address. Raises if one does not answer."""
        return {w.address: await self._unary(w.address, "GetInfo", pb.GetInfoRequest()) for w in self._pool.workers}

    async def load(self) -> dict[str, pb.GetLoadResponse]:
        """GetLoad of every worker, by address. Raises if one does not answer."""
        return {w.address: await self._unary(w.address, "GetLoad", pb.GetLoadRequest()) for w in self._pool.workers}

    async def _unary(self, address: str, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub(address), method)(
                request, timeout=self._connect_timeout, wait_for_ready=True
            )
        except grpc.RpcError as error:
            raise from_rpc(error, address) from None

    # Generate

    async def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[np.ndarray],
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
        logprobs: str | Sequence[str] = "temperature",
        top_logprobs: int = 0,
        kept_token_ids: bool = False,
        prompt_logprobs: bool = False,
        timeout: float | None = None,
        time_budget_s: float = 0.0,
        min_weight_version: tuple[int, int] | None = None,
        priority: int = 0,
        session_id: str | Sequence[str] = "",
        cache_salt: str = "",
        progress: bool | None = None,
    ) -> Rollouts:
        """`n` samples of each prompt (token ids), each with its log-probabilities.

        logprobs: kinds, of which Rollouts.logprobs gives the first: "temperature" (log_softmax(logits / T), what a
          policy-gradient loss uses), "raw", "processed"; () for none. top_logprobs: also the k best tokens, 0 to 64.
        kept_token_ids: also which ids masks and filters (top_p, top_k, ...) left to draw from: Sample.kept.
        prompt_logprobs: also those of the prompts' own tokens, of the kinds "raw" and "temperature" among `logprobs`:
          Rollouts.prompt_logprobs. In bits what score() gives.
        time_budget_s: after it the samples end as "aborted" with what they have. 0: none.
        session_id: one for all prompts or one for each; prompts of a session go to one worker.
        progress: a tqdm bar; None: if tqdm is there, standard error is a terminal, and the call takes a while.

        Of equal prompts under one given seed the second gets the sample indices that follow the first's, and so other
        draws. Cancelling aborts what runs at the workers. Raises LockstepError; then nothing is returned.
        """
        prompts = [_token_array(p, f"prompts[{i}]") for i, p in enumerate(prompts)]
        kinds = logprob_kinds(logprobs)
        sampling = sampling or SamplingParams()
        sessions = [session_id] * len(prompts) if isinstance(session_id, str) else list(session_id)
        if len(sessions) != len(prompts):
            raise InvalidRequest(f"session_id: {len(sessions)} for {len(prompts)} prompts")
        if n < 1:
            raise InvalidRequest(f"n: {n}, want at least 1")
        prompt_kinds = tuple(kind for kind in kinds if kind != "processed") if prompt_logprobs else ()
        if prompt_logprobs and not prompt_kinds:
            raise InvalidRequest(f"prompt_logprobs: with logprobs={logprobs!r}, want 'raw' or 'temperature' among them")
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        template = pb.GenerateRequest(
            sampling=sampling.to_proto(),
            time_budget_ms=round(time_budget_s * 1000),
            priority=priority,
            cache_salt=cache_salt,
            stream_interval=64,
            detach_on_disconnect=True,
        )
        if kinds or kept_token_ids:
            template.logprobs.CopyFrom(
                pb.LogprobOptions(kinds=kinds.values(), top_k=top_logprobs, kept_token_ids=kept_token_ids)
            )
        if prompt_logprobs:
            template.logprobs.prompt.SetInParent()  # every position
        if min_weight_version is not None:
            template.min_weight_version.CopyFrom(
                pb.WeightVersion(epoch=min_weight_version[0], step=min_weight_version[1])
            )
        limit = asyncio.Semaphore(self._max_in_flight * len(self._pool.workers))
        seen: dict[bytes, int] = {}
        with Progress(len(prompts) * n, "samples", progress) as bar:

            async def one(index: int, first: int) -> Assembly:
                seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
                length = len(prompts[index])
                assembly = Assembly(index, first, n, seed, tuple(kinds), kept_token_ids, prompt_kinds, length)
                request = pb.GenerateRequest()
                request.CopyFrom(template)
                request.prompt_token_ids.extend(prompts[index].tolist())
                request.session_id = sessions[index]
                request.sampling.seed = seed
                async with limit:
                    await self._fill(assembly, request, first, n, deadline)
                bar.add(n)
                return assembly

            jobs = []
            for index, prompt in enumerate(prompts):
                first = seen.get(prompt.tobytes(), 0) if sampling.seed is not None else 0
                seen[prompt.tobytes()] = first + n
                jobs.append(one(index, first))
            assemblies = await _all(jobs)
        samples = [assembly.sample(index) for assembly in assemblies for index in sorted(assembly.partials)]
        of_prompts = [assembly.prompt_logprobs() for assembly in assemblies] if prompt_logprobs else None
        return Rollouts(prompts, samples, n, tuple(kinds), of_prompts)

    async def _fill(
        self, assembly: Assembly, request: pb.GenerateRequest, first: int, n: int, deadline: float, lost: int = 0
    ) -> None:
        """Runs `request` for samples first to first + n - 1 until they are done, wherever that takes it."""
        wanted = range(first, first + n)
        request.first_sample_index, request.n = first, n
        try:
            await self._run(assembly, request, wanted, deadline)
            cause: LockstepError = WorkerUnavailable("the worker stopped", code=Code.UNAVAILABLE)
        except _Lost as loss:
            cause = loss.error
        left = [i for i in wanted if i in assembly.cut_off()]
        if not left:
            return
        if lost >= 2 + len(self._pool.workers):
            raise cause
        for index in left:
            assembly.reopen(index, keep_tokens=self._on_loss == "continue")
        jobs = []
        for index in left:
            again = pb.GenerateRequest()
            again.CopyFrom(request)
            if request.logprobs.HasField("prompt"):
                if jobs or not assembly.wants_prompt:
                    again.logprobs.ClearField("prompt")  # of one request only, and not twice
                else:
                    assembly.restart_prompt()
            del again.generated_prefix_ids[:]
            again.generated_prefix_ids.extend(assembly.tokens(index))
            jobs.append(self._fill(assembly, again, index, 1, deadline, lost + 1))
        await _all(jobs)

    async def _run(self, assembly: Assembly, request: pb.GenerateRequest, wanted: range, deadline: float) -> None:
        """One request at one worker, with as many streams as reading it takes. Raises _Lost if it is gone."""
        failures = 0
        tried: list[str] = []
        last: grpc.RpcError | None = None
        while True:
            worker = await self._worker(deadline, request.session_id, tried, last)
            request.request_id = str(uuid.uuid4())
            self._open[request.request_id] = worker.address
            worker.in_flight += len(wanted)
            try:
                attempt = self._attempt(assembly, request, worker, wanted, deadline)
                error = await self._while_answering(worker, attempt)
                if error is not None and retry_after_s(error) is None:
                    self._abort_later(request.request_id)  # not the worker's answer: it may run it all the same
            except BaseException:
                self._abort_later(request.request_id)
                raise
            finally:
                worker.in_flight -= len(wanted)
                self._open.pop(request.request_id, None)
            if error is None:
                return
            if error.code() == Code.DEADLINE_EXCEEDED:
                raise from_rpc(last or error, worker.address)
            failures += not _queue_full(error)
            self._note_refusal(worker, error)
            tried, last = [worker.address], error
            if failures > 3 * len(self._pool.workers):
                raise from_rpc(error, worker.address)
            _left(deadline, error, worker.address)

    async def _attempt(
        self, assembly: Assembly, request: pb.GenerateRequest, worker: WorkerState, wanted: range, deadline: float
    ) -> grpc.RpcError | None:
        """Reads a request to its end at `worker`; or returns why that one did not take it."""
        accepted = began = False
        try:
            async for message in self._read(assembly, request, worker, deadline):
                accepted, began = True, began or not message.HasField("accepted")
        except grpc.RpcError as error:
            # One that waits for its version is accepted first; where it never came, the worker says when to come again.
            refused = not accepted or (not began and retry_after_s(error) is not None)
            if refused and error.code() in _NOT_TAKEN and not too_large(error):
                return error
            if not accepted or error.code() not in _BROKEN:
                raise from_rpc(error, worker.address) from None
            await self._reattach(assembly, request, worker, wanted, deadline, error)
        return None

    def _note_refusal(self, worker: WorkerState, error: grpc.RpcError) -> None:
        wait = retry_after_s(error)
        if error.code() == Code.UNAVAILABLE and wait is None:
            worker.healthy = False
            worker.last_error = error.details() or "UNAVAILABLE"
        worker.avoid_until = time.monotonic() + (0.1 if wait is None else wait)

    async def _read(
        self, assembly: Assembly, request: pb.GenerateRequest, worker: WorkerState, deadline: float
    ) -> AsyncIterator[pb.GenerateResponse]:
        call = self._stub(worker.address).Generate(request, timeout=_left(deadline))
        try:
            async for message in call:
                assembly.add(message, worker.address)
                yield message
        finally:
            call.cancel()

    async def _reattach(
        self,
        assembly: Assembly,
        request: pb.GenerateRequest,
        worker: WorkerState,
        wanted: range,
        deadline: float,
        error: grpc.RpcError,
    ) -> None:
        """Reads the rest of a broken stream at the same worker. Raises _Lost if that is not to be had."""
        give_up = time.monotonic() + self._reattach_s
        while any(i in wanted for i in assembly.unfinished()):
            finished = [i for i in wanted if i not in assembly.unfinished()]
            again = pb.GenerateRequest(request_id=request.request_id, stream_interval=request.stream_interval)
            again.attach.samples.extend(
                pb.Attach.SampleOffset(sample_index=i, offset=assembly.offset(i)) for i in wanted
            )
            if request.logprobs.HasField("prompt"):
                again.attach.prompt_position = assembly.next_prompt_position
            try:
                call = self._stub(worker.address).Generate(again, timeout=_left(deadline))
                try:
                    async for message in call:
                        if message.sample_index in finished:
                            continue  # its `done` comes again
                        assembly.add(message, worker.address)
                        give_up = time.monotonic() + self._reattach_s
                finally:
                    call.cancel()
                if any(i in wanted for i in assembly.unfinished()):
                    raise WorkerDefect("the re-attached stream ended before its samples", worker=worker.address)
            except grpc.RpcError as failure:
                error = failure
                if failure.code() in (Code.NOT_FOUND, Code.OUT_OF_RANGE) or time.monotonic() > give_up:
                    if failure.code() not in _LOST:
                        raise from_rpc(failure, worker.address) from None
                    if failure.code() == Code.UNAVAILABLE:
                        worker.healthy = False
                        worker.last_error = failure.details() or "UNAVAILABLE"
                    raise _Lost(from_rpc(error, worker.address)) from None
                if failure.code() not in _LOST:
                    raise from_rpc(failure, worker.address) from None
                await asyncio.sleep(0.1)

    def _abort_later(self, request_id: str) -> None:
        """Frees what a request may hold at its worker, which would go on with it: nobody reads it any more."""
        address = self._open.pop(request_id, None)
        if address is None:
            return
        task = asyncio.get_running_loop().create_task(self._abort(address, request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, address: str, request_id: str) -> None:
        give_up = time.monotonic() + _ABORT_S
        answers = 0
        while (left := give_up - time.monotonic()) > 0:
            try:
                call = self._stub(address).Abort(
                    pb.AbortRequest(request_id=request_id), timeout=left, wait_for_ready=True
                )
                answers += 1 + (await call).found
            except grpc.RpcError as error:
                if error.code() != Code.UNAVAILABLE:
                    return
            if answers > 1:  # one that did not find it may have overtaken the request
                return
            await asyncio.sleep(0.2)

    # Score

    async def score(
        self,
        sequences: Sequence[Sequence[int]] | Sequence[np.ndarray],
        *,
        kind: str = "temperature",
        temperature: float | None = None,
        timeout: float | None = None,
        min_weight_version: tuple[int, int] | None = None,
        priority: int = 0,
        session_id: str = "",
        progress: bool | None = None,
    ) -> list[np.ndarray]:
        """Log-probabilities of given tokens: fp32 [T - 1] for each sequence of T tokens, of positions 1 to T - 1.

        kind: "temperature" (of log_softmax(logits / temperature)) or "raw". Raises LockstepError.
        """
        sequences = [_token_array(s, f"sequences[{i}]") for i, s in enumerate(sequences)]
        kinds = logprob_kinds(kind, ("raw", "temperature"))
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        limit = asyncio.Semaphore(self._max_in_flight * len(self._pool.workers))
        with Progress(len(sequences), "sequences", progress) as bar:

            async def one(tokens: np.ndarray) -> np.ndarray:
                request = pb.ScoreRequest(prompt_token_ids=tokens.tolist(), priority=priority, session_id=session_id)
                request.logprobs.kinds.extend(kinds.values())
                if temperature is not None:
                    request.temperature = temperature
                if min_weight_version is not None:
                    version = pb.WeightVersion(epoch=min_weight_version[0], step=min_weight_version[1])
                    request.min_weight_version.CopyFrom(version)
                async with limit:
                    result = await self._score_one(request, kind, len(tokens) - 1, deadline)
                bar.add(1)
                return result

            return await _all([one(tokens) for tokens in sequences])

    async def _score_one(self, request: pb.ScoreRequest, kind: str, count: int, deadline: float) -> np.ndarray:
        failures, tried, last = 0, [], None
        while True:
            worker = await self._worker(deadline, request.session_id, tried, last)
            worker.in_flight += 1
            try:
                values, done = await self._while_answering(worker, self._read_score(request, kind, worker, deadline))
            except _Lost as loss:
                failures += 1
                tried = [worker.address]
                if failures > 3 * len(self._pool.workers):
                    raise loss.error from None
                continue
            except grpc.RpcError as error:
                if error.code() not in _BROKEN or too_large(error):
                    raise from_rpc(error, worker.address) from None
                failures += not _queue_full(error)
                if failures > 3 * len(self._pool.workers):
                    raise from_rpc(error, worker.address) from None
                self._note_refusal(worker, error)
                tried, last = [worker.address], error
                _left(deadline, error, worker.address)
                continue
            finally:
                worker.in_flight -= 1
            if done is not None and done.finish_reason == pb.FINISH_REASON_SCORED and len(values) == count:
                return np.array(values, np.float32)
            if done is not None and done.abort_reason == pb.ABORT_REASON_DEADLINE:
                raise DeadlineExceeded("score", code=Code.DEADLINE_EXCEEDED, worker=worker.address)
            failures += 1
            tried = [worker.address]
            if failures > 3 * len(self._pool.workers):
                raise WorkerDefect(f"{len(values)} of {count} values, done: {done}", worker=worker.address)

    async def _read_score(
        self, request: pb.ScoreRequest, kind: str, worker: WorkerState, deadline: float
    ) -> tuple[list[float], pb.Done | None]:
        values: list[float] = []
        done = None
        async for message in self._stub(worker.address).Score(request, timeout=_left(deadline)):
            values.extend(getattr(message.logprobs, kind))
            if message.HasField("done"):
                done = message.done
        return values, done


async def _all(jobs: list) -> list:
    """asyncio.gather, but the first failure cancels the rest and waits for it."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _queue_full(error: grpc.RpcError) -> bool:
    """A worker says so, and when to try again; gRPC uses the same code for limits of its own."""
    return error.code() == Code.RESOURCE_EXHAUSTED and retry_after_s(error) is not None


def _left(deadline: float, error: grpc.RpcError | None = None, worker: str | None = None) -> float:
    """Seconds to the deadline; raises DeadlineExceeded (with what went wrong last) past it."""
    left = deadline - time.monotonic()
    if left <= 0:
        if error is not None and error.code() == Code.RESOURCE_EXHAUSTED:
            raise from_rpc(error, worker or "") from None
        reason = f"; last: {error.code().name}: {error.details()}" if error is not None else ""
        raise DeadlineExceeded(f"the call's timeout passed{reason}", code=Code.DEADLINE_EXCEEDED, worker=worker)
    return left


def _token_array(tokens: Any, name: str) -> np.ndarray:
    """int32 [T] of any sequence of integers, a torch tensor included."""
    if isinstance(tokens, str):
        raise InvalidRequest(f"{name}: a string, want token ids (lockstep.text.encode makes them)")
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InvalidRequest(f"{name}: {array.dtype} of shape {array.shape}, want a non-empty list of token ids")
    if int(array.min()) < 0 or int(array.max()) > 2**31 - 1:
        raise InvalidRequest(f"{name}: ids from {array.min()} to {array.max()}, want 0 <= id < vocab_size")
    return array.astype(np.int32)

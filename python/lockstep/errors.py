"""What can go wrong, by what a caller would do about it. Every error carries the gRPC status and the worker."""

from __future__ import annotations

import re

import grpc


class LockstepError(Exception):
    """Base of all. `code`: the gRPC status, None for errors of this side. `worker`: HOST:PORT, None if of none."""

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, worker: str | None = None):
        self.message, self.code, self.worker = message, code, worker
        where = f" (worker {worker})" if worker else ""
        super().__init__(f"{code.name + ': ' if code else ''}{message}{where}")


class InvalidRequest(LockstepError, ValueError):
    """A field is wrong; the message names it, its value and what would be right. Do not retry."""


class WorkerUnavailable(LockstepError, ConnectionError):
    """No worker could take the request: down, draining, or without the weights asked for."""


class NotAuthenticated(LockstepError, PermissionError):
    """The worker wants a token, or another one. Do not retry."""


class Overloaded(LockstepError):
    """Queues stayed full until the deadline. `retry_after_s`: what the worker advised, seconds."""

    retry_after_s: float | None = None


class DeadlineExceeded(LockstepError, TimeoutError):
    """The call's timeout passed."""


class WorkerDefect(LockstepError):
    """INTERNAL, or an answer that breaks the protocol: a defect of the worker."""


class UpdateFailed(LockstepError):
    """A weight update did not reach all workers. `report`: the PublishReport, with each worker's state and error."""

    report = None


class RollbackFailed(LockstepError):
    """A rollback did not reach all workers. `results`: by worker, whether the update was open there, or its error."""

    results: dict[str, bool | LockstepError]


class NcclError(LockstepError, RuntimeError):
    """NCCL is not there or too old, or a call of it failed: mostly, a peer is gone. `result`: its ncclResult_t, if any."""

    result: int | None = None


class NotSupported(LockstepError, NotImplementedError):
    """Not in this version."""


_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: WorkerUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: WorkerDefect,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}


def retry_after_s(error: grpc.RpcError) -> float | None:
    """Trailing metadata `retry-after-ms`, in seconds."""
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after-ms":
            return int(value) / 1000
    return None


# gRPC's own text, of the request: the worker's limit, or this side's.
_TOO_LARGE = re.compile(r"(?:Sent|(?<!CLIENT: )Received) message larger than max \((\d+) vs\. (\d+)\)")


def too_large(error: grpc.RpcError) -> re.Match[str] | None:
    """(bytes, limit) of a request that is larger than a worker takes; it never will."""
    return _TOO_LARGE.search(error.details() or "") if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED else None


def from_rpc(error: grpc.RpcError, worker: str) -> LockstepError:
    """The LockstepError for a failed call to `worker`."""
    code = error.code()
    if sizes := too_large(error):
        size, limit = sizes.groups()
        text = f"the request has {size} bytes, want at most {limit}"
        return InvalidRequest(text, code=code, worker=worker)
    result = _BY_CODE.get(code, LockstepError)(error.details() or "no details", code=code, worker=worker)
    if isinstance(result, Overloaded):
        result.retry_after_s = retry_after_s(error)
    return result

"""NCCL through ctypes: broadcasts with a deadline, of memory by its address. No torch, no compiled extension.

The counterpart of the worker's weights_sync/nccl_abi.h, nccl_library.h and nccl_group.h, where the rules of non-blocking
communicators are written down.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Sequence

from .errors import DeadlineExceeded, InvalidRequest, LockstepError, NcclError

UNIQUE_ID_BYTES = 128
_MIN_VERSION = 21800
_WANT = "want libnccl.so.2 of NCCL 2.18 or newer"
_SUCCESS, _IN_PROGRESS = 0, 7
_RESULTS = {
    1: "ncclUnhandledCudaError",
    2: "ncclSystemError",
    3: "ncclInternalError",
    4: "ncclInvalidArgument",
    5: "ncclInvalidUsage",
    6: "ncclRemoteError",
    7: "ncclInProgress",
}
_UINT8 = 1
_UNDEFINED = -(1 << 31)
FINALIZE_WAIT_S = 5.0
# A broadcast is enqueued in less: sleeping, which takes its time to wake, is for longer waits.
_SPIN_S = 300e-6


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * UNIQUE_ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t as of 2.18. `size` and `version` make later libraries take their defaults for what they have added."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    ]


_COMM = ctypes.c_void_p
_SIGNATURES = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(_COMM),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ],
    "ncclCommGetAsyncError": [_COMM, ctypes.POINTER(ctypes.c_int)],
    "ncclBroadcast": [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        _COMM,
        ctypes.c_void_p,
    ],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclCommFinalize": [_COMM],
    "ncclCommDestroy": [_COMM],
    "ncclCommAbort": [_COMM],
}


def version_name(version: int) -> str:
    """21803: "2.18.3"; 2708: "2.7.8"."""
    if version < 10000:
        return f"{version // 1000}.{version % 1000 // 100}.{version % 100}"
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def _candidates(path: str | None) -> list[str]:
    if path := path or os.environ.get("LOCKSTEP_NCCL_LIBRARY"):
        return [path]
    found = ["libnccl.so.2"]  # the loader's; where torch is loaded, the one that it has loaded
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        found.append(str(pathlib.Path(folder) / "lib" / "libnccl.so.2"))
    return found


class NcclLibrary:
    """A loaded libnccl. Any thread may use it."""

    def __init__(self, path: str, functions: ctypes.CDLL, version: int):
        self.path, self.functions, self.version = path, functions, version

    @classmethod
    def load(cls, path: str | None = None) -> NcclLibrary:
        """`path`, else LOCKSTEP_NCCL_LIBRARY, else the loader's libnccl.so.2, else that of an installed NCCL wheel."""
        tried = []
        for candidate in _candidates(path):
            try:
                return cls._open(candidate)
            except (OSError, NcclError) as error:
                tried.append(f"{candidate}: {getattr(error, 'message', None) or error}")
        raise NcclError(f"no usable NCCL; {_WANT}; tried {'; '.join(tried)}")

    @classmethod
    def _open(cls, path: str) -> NcclLibrary:
        functions = ctypes.CDLL(path)
        version = ctypes.c_int()
        # Of an old library the version says more than the symbol which it lacks.
        if hasattr(functions, "ncclGetVersion") and functions.ncclGetVersion(ctypes.byref(version)) == _SUCCESS:
            if version.value < _MIN_VERSION:
                raise NcclError(f"NCCL version {version_name(version.value)}; want 2.18 or newer")
        for name, arguments in _SIGNATURES.items():
            if not hasattr(functions, name):
                raise NcclError(f"it has no symbol {name}")
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        for name, arguments in (("ncclGetErrorString", [ctypes.c_int]), ("ncclGetLastError", [_COMM])):
            if hasattr(functions, name):
                function = getattr(functions, name)
                function.argtypes, function.restype = arguments, ctypes.c_char_p
        return cls(path, functions, version.value)

    def unique_id(self) -> bytes:
        """128 bytes for all ranks of one communicator. This process must live until all have come."""
        unique_id = _UniqueId()
        result = self.functions.ncclGetUniqueId(ctypes.byref(unique_id))
        if result != _SUCCESS:
            raise self.error(result, "ncclGetUniqueId")
        return ctypes.string_at(ctypes.addressof(unique_id), UNIQUE_ID_BYTES)

    def error(self, result: int, what: str) -> NcclError:
        text = last = None
        if hasattr(self.functions, "ncclGetErrorString"):
            text = self.functions.ncclGetErrorString(result)
        if hasattr(self.functions, "ncclGetLastError"):
            last = self.functions.ncclGetLastError(None)
        message = f"{what}: {_RESULTS.get(result, 'unknown result')} ({result}): {(text or b'no text').decode()}"
        if last:
            message += f"; NCCL's last error: {last.decode()}"
        error = NcclError(message)
        error.result = result
        return error


class Communicator:
    """One rank. For one thread at a time; only cancel() may come from another.

    Each call runs on the device that is current in its thread, which must be the one of the constructor. After an error,
    a timeout or an interrupt (KeyboardInterrupt, say) the communicator is aborted, and all its calls are NcclErrors.
    """

    def __init__(
        self,
        library: NcclLibrary,
        unique_id: bytes,
        nranks: int,
        rank: int,
        timeout_s: float,
        *,
        max_ctas: int = 0,
        cancelled: Callable[[], bool] | None = None,
    ):
        """Waits until all ranks have come, or until `cancelled`, asked meanwhile, is true.

        max_ctas: thread blocks that a broadcast may take; 0: NCCL's choice.
        """
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise InvalidRequest(f"unique_id: {len(unique_id)} bytes, want {UNIQUE_ID_BYTES}")
        if nranks < 1 or not 0 <= rank < nranks:
            raise InvalidRequest(f"rank {rank} of {nranks}: want a rank from 0 to nranks - 1")
        self.library, self.nranks, self.rank = library, nranks, rank
        self._functions = library.functions
        self._comm = _COMM()
        self._cancelled = False
        self._asked = cancelled
        self._cause = ""
        config = _Config(
            size=ctypes.sizeof(_Config),
            magic=0xCAFEBEEF,
            version=_MIN_VERSION,
            blocking=0,
            cga_cluster_size=_UNDEFINED,
            min_ctas=_UNDEFINED,
            max_ctas=max_ctas or _UNDEFINED,
            net_name=None,
            split_share=_UNDEFINED,
        )
        deadline = time.monotonic() + timeout_s
        result = self._functions.ncclCommInitRankConfig(
            ctypes.byref(self._comm), nranks, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._finish(result, "the ranks to come together", deadline)
        self._asked = None

    @property
    def healthy(self) -> bool:
        return bool(self._comm)

    def broadcast(self, pieces: Sequence[tuple[int, int]], root: int, stream: int, timeout_s: float) -> None:
        """pieces: (address, bytes), in place: what root holds comes to lie at the same piece of all ranks.

        It returns when all is enqueued on `stream` (a cudaStream_t). On a device the data is there when the stream has
        come so far, for which wait() waits. 0 bytes: nothing is sent; the ranks must agree in that as well.
        """
        deadline = time.monotonic() + timeout_s
        if not 0 <= root < self.nranks:
            raise InvalidRequest(f"root: {root}, want 0 to {self.nranks - 1}")
        for i, (address, size) in enumerate(pieces):
            if size < 0 or (size > 0 and not address):
                raise InvalidRequest(f"pieces[{i}]: {size} bytes at {address:#x}, want 0 or more bytes of memory")
        self._check_usable()
        what = f"a broadcast of {sum(size for _, size in pieces)} bytes from rank {root}"
        if self._cancelled:
            raise self._fail(NcclError(self._name("cancelled")))
        pieces = [piece for piece in pieces if piece[1] > 0]
        if not pieces:
            return
        result = self._functions.ncclGroupStart()
        if result == _SUCCESS:
            for address, size in pieces:
                result = self._functions.ncclBroadcast(address, address, size, _UINT8, root, self._comm, stream or None)
                if result not in (_SUCCESS, _IN_PROGRESS):
                    break
                result = _SUCCESS
            # Also after an error: the group that is open belongs to the thread, not to the communicator.
            end = self._functions.ncclGroupEnd()
            result = end if result == _SUCCESS else result
        self._finish(result, what, deadline)

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Until done() (event.query of a CUDA event behind a broadcast, say), looking after the communicator meanwhile."""
        self._check_usable()
        self._poll(lambda state: done(), what, time.monotonic() + timeout_s)

    def cancel(self) -> None:
        """The call in progress, or else the next one, aborts."""
        self._cancelled = True

    def abort(self) -> None:
        if self._comm:
            self._cause = self._cause or "abort() was called"
            comm, self._comm = self._comm, _COMM()
            self._functions.ncclCommAbort(comm)

    def close(self) -> None:
        """Finalises and destroys a healthy communicator; one that does not come to its end in 5 s is aborted."""
        if not self._comm:
            return
        try:
            self._finish(
                self._functions.ncclCommFinalize(self._comm),
                "the communicator's end",
                time.monotonic() + FINALIZE_WAIT_S,
            )
        except LockstepError:
            return  # aborted
        self._cause = "it was closed"
        comm, self._comm = self._comm, _COMM()
        self._functions.ncclCommDestroy(comm)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close() if kind is None else self.abort()

    def _name(self, what: str) -> str:
        return f"rank {self.rank} of {self.nranks}: {what}"

    def _check_usable(self) -> None:
        if not self._comm:
            raise NcclError(f"the communicator is aborted or closed: {self._cause}")

    def _fail(self, error: LockstepError) -> LockstepError:
        self._cause = error.message
        self.abort()
        return error

    def _finish(self, result: int, what: str, deadline: float) -> None:
        """Of a call that may have returned ncclInProgress: polls it to its end."""
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise self._fail(self.library.error(result, self._name(what)))
        self._poll(lambda state: state == _SUCCESS, what, deadline)

    def _poll(self, done: Callable[[int], bool], what: str, deadline: float) -> None:
        state = ctypes.c_int()
        spin_until, sleep_s = time.monotonic() + _SPIN_S, 20e-6
        try:
            while True:
                asked = self._functions.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
                now = state.value if asked == _SUCCESS else asked
                # Before the state: what is complete stays so, whatever befell a peer afterwards.
                if done(now):
                    return
                if now not in (_SUCCESS, _IN_PROGRESS):
                    raise self.library.error(now, self._name(what))
                if self._cancelled or (self._asked and self._asked()):
                    raise NcclError(self._name(f"cancelled while waiting for {what}"))
                clock = time.monotonic()
                if clock >= deadline:
                    raise DeadlineExceeded(self._name(f"the deadline passed while waiting for {what}"))
                if clock < spin_until:
                    time.sleep(0)  # lets other threads have the interpreter
                    continue
                time.sleep(min(sleep_s, deadline - clock))
                sleep_s = min(2 * sleep_s, 1e-3)
        except BaseException as error:
            self._cause = str(error) or type(error).__name__
            self.abort()
            raise

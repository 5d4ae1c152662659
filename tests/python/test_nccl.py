"""lockstep._nccl over the fake NCCL of tests/fake_nccl: ranks in several processes, and what goes wrong with them."""

import ctypes
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

import pytest

from lockstep._nccl import Communicator, NcclLibrary, version_name
from lockstep.errors import DeadlineExceeded, InvalidRequest, NcclError

RANK = pathlib.Path(__file__).with_name("nccl_rank.py")


@pytest.fixture
def library(fake_nccl):
    return NcclLibrary.load(fake_nccl)


class Rank:
    def __init__(self, path, unique_id, nranks, rank, action, *sizes):
        command = [sys.executable, RANK, path, nranks, rank, action, *sizes]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.process.stdin.write(unique_id.hex() + "\n")
        self.process.stdin.flush()

    def await_stop(self):
        assert os.WIFSTOPPED(os.waitpid(self.process.pid, os.WUNTRACED)[1])


@pytest.fixture
def start(fake_nccl):
    ranks = []

    def start(*arguments):
        ranks.append(Rank(fake_nccl, *arguments))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()


def piece(memory):
    return ctypes.addressof(memory), len(memory)


def zeros(size=1000):
    return ctypes.create_string_buffer(size)


def pair(library):
    """Two ranks of this process."""
    unique_id = library.unique_id()
    made = [None]

    def other():
        made[0] = Communicator(library, unique_id, 2, 1, 60)

    thread = threading.Thread(target=other)
    thread.start()
    first = Communicator(library, unique_id, 2, 0, 60)
    thread.join()
    return first, made[0]


def test_broadcast_to_three(library, start):
    sizes = [1, 4097, 5_000_000, 16]
    unique_id = library.unique_id()
    others = [start(unique_id, 4, rank, "receive", *sizes) for rank in (1, 2, 3)]
    random.seed(3)
    data = [ctypes.create_string_buffer(random.randbytes(size), size) for size in sizes]
    with Communicator(library, unique_id, 4, 0, 60) as communicator:
        for memory in data:
            communicator.broadcast([piece(memory)], 0, 0, 60)
        for root in (1, 2, 3):
            memory = zeros()
            communicator.broadcast([piece(memory)], root, 0, 60)
            assert memory.raw == bytes([root]) * 1000
    for other in others:
        output, _ = other.process.communicate(timeout=60)
        assert other.process.returncode == 0
        assert [int(line) for line in output.split()] == [zlib.crc32(m.raw) for m in data]


def test_many_pieces_at_once(library):
    first, second = pair(library)
    sizes = [0, 10, 1 << 20, 1]
    source = [ctypes.create_string_buffer(bytes([i + 1]) * size, size) for i, size in enumerate(sizes)]
    target = [zeros(size) for size in sizes]
    sender = threading.Thread(target=first.broadcast, args=([piece(m) for m in source], 0, 0, 60))
    sender.start()
    second.broadcast([piece(m) for m in target], 0, 0, 60)
    sender.join()
    assert [m.raw for m in target] == [m.raw for m in source]
    first.broadcast([], 0, 0, 60)
    first.close()
    first.close()
    second.close()
    with pytest.raises(NcclError, match="aborted or closed: it was closed"):
        first.broadcast([piece(source[1])], 0, 0, 60)


def test_a_dead_peer(library, start):
    unique_id = library.unique_id()
    other = start(unique_id, 2, 1, "stop")
    communicator = Communicator(library, unique_id, 2, 0, 60)
    other.await_stop()
    threading.Timer(0.2, other.process.kill).start()
    with pytest.raises(NcclError, match=r"ncclRemoteError \(6\): a peer exited") as caught:
        communicator.broadcast([piece(zeros(64 << 20))], 0, 0, 60)
    assert caught.value.result == 6 and not communicator.healthy
    with pytest.raises(NcclError, match="the communicator is aborted or closed: rank 0 of 2: a broadcast"):
        communicator.broadcast([piece(zeros())], 0, 0, 60)
    communicator.close()


def test_a_silent_peer(library, start):
    unique_id = library.unique_id()
    other = start(unique_id, 2, 1, "stop")
    communicator = Communicator(library, unique_id, 2, 0, 60)
    other.await_stop()
    begin = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match="rank 0 of 2: the deadline passed while waiting for a broadcast of 1000"
    ):
        communicator.broadcast([piece(zeros())], 0, 0, 0.3)
    assert 0.3 <= time.monotonic() - begin < 10
    other.process.send_signal(signal.SIGCONT)


def test_a_missing_rank(library):
    with pytest.raises(DeadlineExceeded, match="waiting for the ranks to come together"):
        Communicator(library, library.unique_id(), 2, 0, 0.2)


def test_cancel(library):
    first, second = pair(library)
    threading.Timer(0.1, first.cancel).start()
    with pytest.raises(NcclError, match="cancelled while waiting for a broadcast"):
        first.broadcast([piece(zeros())], 0, 0, 60)
    second.cancel()
    with pytest.raises(NcclError, match="rank 1 of 2: cancelled"):
        second.broadcast([piece(zeros())], 0, 0, 60)


def test_wait_and_abort(library):
    first, second = pair(library)
    answers = iter([False, False, True])
    first.wait(lambda: next(answers), "the third answer", 60)
    with pytest.raises(DeadlineExceeded, match="waiting for an event"):
        first.wait(lambda: False, "an event", 0.1)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.wait(interrupted, "an event", 60)
    assert not second.healthy, "what is interrupted is aborted"
    second.abort()


def test_threads_go_on_while_one_waits(library):
    """A wait holds no lock of the interpreter."""
    first, second = pair(library)
    turns = 0
    over = threading.Event()

    def count():
        nonlocal turns
        while not over.is_set():
            turns += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(DeadlineExceeded):
        first.broadcast([piece(zeros())], 0, 0, 0.5)
    over.set()
    thread.join()
    assert turns > 3, "on a busy machine a sleep of 1 ms takes many"
    second.abort()


def test_no_leak(library):
    def count(what):
        return len(os.listdir(f"/proc/self/{what}"))

    for communicator in pair(library):
        communicator.close()
    before = count("fd"), count("task")
    for i in range(50):
        for communicator in pair(library):
            communicator.abort() if i % 2 else communicator.close()
    end = time.monotonic() + 5
    while count("task") > before[1] and time.monotonic() < end:
        time.sleep(0.01)  # a thread that was joined stays in /proc for a moment
    assert (count("fd"), count("task")) <= before


def test_bad_arguments(library):
    with pytest.raises(InvalidRequest, match="unique_id: 5 bytes, want 128"):
        Communicator(library, b"short", 1, 0, 60)
    with pytest.raises(InvalidRequest, match="rank 2 of 2"):
        Communicator(library, bytes(128), 2, 2, 60)
    with pytest.raises(NcclError, match="ncclInvalidArgument"):
        Communicator(library, bytes(128), 2, 1, 60)
    with Communicator(library, library.unique_id(), 1, 0, 60) as communicator:
        with pytest.raises(InvalidRequest, match="root: 1, want 0 to 0"):
            communicator.broadcast([], 1, 0, 60)
        with pytest.raises(InvalidRequest, match=r"pieces\[0\]: 4 bytes at 0x0"):
            communicator.broadcast([(0, 4)], 0, 0, 60)
        assert communicator.healthy
        with pytest.raises(NcclError, match="stream: want null"):
            communicator.broadcast([piece(zeros())], 0, 1, 60)


def test_load(fake_nccl, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCKSTEP_NCCL_LIBRARY", fake_nccl)
    assert NcclLibrary.load().version == 22800
    monkeypatch.delenv("LOCKSTEP_NCCL_LIBRARY")
    with pytest.raises(NcclError, match="want libnccl.so.2 of NCCL 2.18 or newer; tried /nowhere/libnccl.so.2: "):
        NcclLibrary.load("/nowhere/libnccl.so.2")
    with pytest.raises(NcclError, match="libm.so.6: it has no symbol ncclGetVersion"):
        NcclLibrary.load("libm.so.6")
    # A wheel: the package is found, the file in it is what counts.
    folder = tmp_path / "nvidia" / "nccl" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: _spec(folder.parent))
    if not _loader_has_nccl():
        with pytest.raises(NcclError, match=f"libnccl.so.2: .*; {folder}/libnccl.so.2: "):
            NcclLibrary.load()
        (folder / "libnccl.so.2").symlink_to(fake_nccl)
        assert NcclLibrary.load().path == str(folder / "libnccl.so.2")


def _spec(folder):
    class Spec:
        submodule_search_locations = [str(folder)]

    return Spec


def _loader_has_nccl():
    try:
        ctypes.CDLL("libnccl.so.2")
    except OSError:
        return False
    return True


def test_too_old(fake_nccl, monkeypatch):
    monkeypatch.setenv("FAKE_NCCL_VERSION", "21403")
    with pytest.raises(NcclError, match="NCCL version 2.14.3; want 2.18 or newer"):
        NcclLibrary.load(fake_nccl)
    assert version_name(2708) == "2.7.8" and version_name(21803) == "2.18.3"

"""Fixtures for tests that talk to real workers over real gRPC.

LOCKSTEP_BUILD names the build directory (default: build/cpu).
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import types

import grpc
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import lockstep_stubs  # noqa: E402

READY = re.compile(r"^lockstep-worker ready data=(\S+) control=(\S+)$")


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
    return ROOT


@pytest.fixture(scope="session")
def build_dir() -> pathlib.Path:
    path = pathlib.Path(os.environ.get("LOCKSTEP_BUILD", "build/cpu"))
    return path if path.is_absolute() else ROOT / path


@pytest.fixture(scope="session")
def stubs() -> types.SimpleNamespace:
    return lockstep_stubs.load()


@pytest.fixture(scope="session")
def pb(stubs):
    return stubs.pb


@pytest.fixture(scope="session")
def secrets_dir(tmp_path_factory) -> types.SimpleNamespace:
    """Files for --token_file and its like: token, control_token, and TLS for 127.0.0.1 (cert, key; other_cert, other_key)."""
    directory = tmp_path_factory.mktemp("secrets")
    made = types.SimpleNamespace(directory=directory)
    for name, text in (("token", "data-plane-token-0123456789"), ("control_token", "control/plane+token=9876543210")):
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(f"{text}\nnot read\n")
        setattr(made, f"{name}_file", path)
        setattr(made, name, text)
    for prefix in ("", "other_"):
        cert, key = directory / f"{prefix}cert.pem", directory / f"{prefix}key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=lockstep", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
        setattr(made, f"{prefix}cert", cert)
        setattr(made, f"{prefix}key", key)
    return made


@pytest.fixture(scope="session")
def tiny_model() -> pathlib.Path:
    return ROOT / "tests" / "data" / "tiny"


class WorkerProcess:
    """A worker program and a channel to it."""

    def __init__(self, stubs, command, ready_timeout):
        self.command = [str(c) for c in command]
        self.log_file = tempfile.NamedTemporaryFile(prefix="lockstep-worker-", suffix=".log")
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log_file, text=True
        )
        self.channel = None
        try:
            self._wait_until_ready(ready_timeout)
        except BaseException:
            self.stop()
            raise
        self.channel = grpc.insecure_channel(self.data)
        self.stub = stubs.grpc.RolloutStub(self.channel)

    def _wait_until_ready(self, timeout):
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        match = READY.match(line.rstrip("\n"))
        if match is None:
            code = self.process.wait()
            raise RuntimeError(
                f"{' '.join(self.command)}\nfirst line {line!r}, exit status {code}, log:\n{self.log()}"
            )
        self.data, self.control = match.groups()

    def log(self) -> str:
        return pathlib.Path(self.log_file.name).read_text()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout=60) -> int:
        return self.process.wait(timeout=timeout)

    def stop(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log_file.close()


@pytest.fixture(scope="session")
def launch(stubs):
    """launch(command, ready_timeout=60) -> WorkerProcess; the caller stops it."""

    def start(command, ready_timeout=60):
        return WorkerProcess(stubs, command, ready_timeout)

    return start


LOOPBACK = ["--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"]


@pytest.fixture(scope="module")
def start_worker(build_dir, launch):
    """start_worker(model_dir, *flags) -> WorkerProcess of lockstep-worker, stopped when the module's tests are over."""
    workers = []

    def start(model_dir, *flags, ready_timeout=300):
        command = [build_dir / "bin" / "lockstep-worker", "--model", model_dir, *LOOPBACK, *flags]
        workers.append(launch(command, ready_timeout))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture(scope="module")
def worker(start_worker, tiny_model):
    """A worker that serves the tiny checkpoint, shared by a module's tests."""
    return start_worker(tiny_model)


@pytest.fixture
def start_fake(build_dir, launch):
    """start_fake(*flags) -> WorkerProcess of fake-worker-server: the same service, with pseudo tokens at a rate the test chooses."""
    workers = []

    def start(*flags):
        command = [build_dir / "bin" / "fake-worker-server", "--model", "none", *LOOPBACK, *flags]
        workers.append(launch(command))
        return workers[-1]

    yield start
    for process in workers:
        process.stop()

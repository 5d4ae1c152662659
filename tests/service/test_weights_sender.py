"""tools/weights_sender against real workers: the C++ sender's half of both transports."""

import importlib
import json
import subprocess

import grpc
import pytest


@pytest.fixture
def workers(start_worker, tiny_model, build_dir):
    library = str(build_dir / "lib" / "libfake_nccl.so")
    started = [start_worker(tiny_model, "--threads", "1", "--nccl_library", library) for _ in range(2)]
    yield started
    for worker in started:
        worker.stop()


@pytest.fixture
def send(build_dir, tiny_model):
    def run(workers, *flags):
        addresses = ",".join(w if isinstance(w, str) else w.control for w in workers)
        command = [build_dir / "bin" / "weights_sender", "--checkpoint", tiny_model, "--workers", addresses, *flags]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)

    return run


def weights(worker):
    module = importlib.import_module("lockstep.v1.weights_pb2_grpc")
    return module.WeightsStub(grpc.insecure_channel(worker.control))


def versions(workers, stubs):
    pb = importlib.import_module("lockstep.v1.weights_pb2")
    found = [weights(w).GetStatus(pb.GetStatusRequest(), timeout=10) for w in workers]
    return [(s.weight_version.epoch, s.weight_version.step, s.state == pb.UPDATE_STATE_SERVING) for s in found]


def nccl(build_dir):
    return ["--transport", "nccl", "--nccl_library", build_dir / "lib" / "libfake_nccl.so"]


@pytest.mark.parametrize("transport", ["stream", "nccl"])
def test_updates(workers, send, stubs, build_dir, transport):
    pb = importlib.import_module("lockstep.v1.weights_pb2")
    before = [{t.name: t.digest for t in weights(w).GetDigests(pb.GetDigestsRequest()).tensors} for w in workers]
    done = send(workers, "--updates", "3", "--first_step", "5", *(nccl(build_dir) if transport == "nccl" else []))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["version"] for line in lines] == [[0, 5], [0, 6], [0, 7]]
    assert all(line["pause_ms"] > 0 and line["send_gb_s"] > 0 for line in lines)
    assert versions(workers, stubs) == [(0, 7, True)] * 2
    after = [{t.name: t.digest for t in weights(w).GetDigests(pb.GetDigestsRequest()).tensors} for w in workers]
    assert after == before  # the same checkpoint's


def test_a_second_sender_replaces_the_first(workers, send, stubs, build_dir):
    for step in (1, 2):
        done = send(workers, "--first_step", step, *nccl(build_dir))
        assert done.returncode == 0, done.stderr
    assert versions(workers, stubs) == [(0, 2, True)] * 2


@pytest.mark.parametrize("transport", ["stream", "nccl"])
def test_a_worker_that_is_not_there(workers, send, stubs, build_dir, transport):
    flags = ["--timeout_seconds", "5", *(nccl(build_dir) if transport == "nccl" else [])]
    done = send([workers[0], "127.0.0.1:1"], *flags)
    assert done.returncode == 1 and "127.0.0.1:1: " in done.stderr
    assert versions(workers, stubs) == [(0, 0, True)] * 2  # rolled back


def test_tokens(start_worker, tiny_model, send, tmp_path, build_dir):
    token = tmp_path / "token"
    token.write_text("a-token-of-24-characters\n")
    token.chmod(0o600)
    library = build_dir / "lib" / "libfake_nccl.so"
    worker = start_worker(tiny_model, "--control_token_file", str(token), "--nccl_library", str(library))
    for step, flags in enumerate(([], nccl(build_dir)), start=1):
        refused = send([worker], "--first_step", step, *flags)
        assert refused.returncode == 1 and "authorization" in refused.stderr, refused.stderr
        done = send([worker], "--first_step", step, "--token_file", token, *flags)
        assert done.returncode == 0, done.stderr
    worker.stop()


def test_wrong_flags(send):
    for flags, text in (
        (["--transport", "rdma"], '--transport: value "rdma"; want stream or nccl'),
        (["--policy", "drop"], '--policy: value "drop"'),
        (["--workers", ""], "--workers: missing"),
    ):
        done = send(["127.0.0.1:1"], *flags)
        assert done.returncode == 2 and text in done.stderr, done.stderr

"""Weight updates of a worker that takes them in the place of what serves (--weights_receive=direct): when it stands
still, and that whatever ends an update but its commit brings the old version back in every bit.
"""

import importlib
import pathlib
import signal
import subprocess
import sys
import time

import checkpoints
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_weights import Reader, Sender, control_stubs, refused, request, spans

FLAGS = ("--max_sequences", "16", "--weights_receive", "direct")
LEARNER = """
import importlib, pathlib, sys, time
sys.path[:0] = {path!r}
import grpc, checkpoints, test_weights
pb, wpb = (importlib.import_module(f"lockstep.v1.{{name}}_pb2") for name in ("rollout", "weights"))
stub = importlib.import_module("lockstep.v1.weights_pb2_grpc").WeightsStub(grpc.insecure_channel({control!r}))
new = checkpoints.perturb(checkpoints.read(pathlib.Path({model!r})), 1)
sender = test_weights.Sender(pb, wpb, stub)
sender.begin(1, new, lease_ms=1000)
def half():
    chunks = list(sender.chunks(1, new))
    yield from chunks[: len(chunks) // 2]
    time.sleep(60)
sender.stub.Push(half(), timeout=60)
"""


@pytest.fixture(scope="module")
def wpb(stubs):
    return importlib.import_module("lockstep.v1.weights_pb2")


@pytest.fixture(scope="module")
def cpb(stubs):
    return importlib.import_module("lockstep.v1.control_pb2")


@pytest.fixture
def armed(start_worker, tiny_model, pb, wpb, monkeypatch):
    """armed(failpoints) -> (worker, its sender)"""

    def start(failpoints=""):
        monkeypatch.setenv("LOCKSTEP_FAILPOINTS", failpoints)
        process = start_worker(tiny_model, *FLAGS)
        return process, Sender(pb, wpb, control_stubs(process)[0])

    return start


def digests(sender, wpb):
    answer = sender.stub.GetDigests(wpb.GetDigestsRequest(), timeout=30)
    return answer.weight_version.step, {t.name: t.digest for t in answer.tensors}


def steps(process, pb):
    return process.stub.GetLoad(pb.GetLoadRequest(), timeout=10).steps


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_an_update_in_place(armed, start_worker, tiny_model, old, new, pb, wpb, cpb, tmp_path):
    process, sender = armed()
    assert "memory: shadow" in process.log() and "memory: staging" not in process.log()
    assert process.stub.GetInfo(pb.GetInfoRequest(), timeout=10).weights_receive == pb.WEIGHTS_RECEIVE_DIRECT
    staged = start_worker(tiny_model)
    assert staged.stub.GetInfo(pb.GetInfoRequest(), timeout=10).weights_receive == pb.WEIGHTS_RECEIVE_STAGED
    assert digests(sender, wpb) == digests(Sender(pb, wpb, control_stubs(staged)[0]), wpb)

    sender.begin(1, new)
    reader = Reader(process.stub, request(pb)).read(until=20)
    sender.push(1, new)
    stood = steps(process, pb)
    control_stubs(process)[1].Resume(cpb.ResumeRequest(), timeout=10)  # ends a client's pause, not this
    time.sleep(0.2)
    assert steps(process, pb) == stood
    sender.verify(1, new)
    result = sender.commit(1)
    assert (result.kept, result.recomputed, result.aborted) == (0, 1, 0)
    assert result.pause_ms > 200
    reader.read()
    cut = reader.done.version_spans[0].end
    assert spans(reader.done) == [(0, 0, 0, cut), (1, 1, cut, 150)]

    checkpoints.write(tmp_path / "new", new, tiny_model)
    other = start_worker(tmp_path / "new")
    want = Reader(other.stub, request(pb)).read()
    after = Reader(process.stub, request(pb)).read()
    assert (after.tokens, after.logprobs) == (want.tokens, want.logprobs)
    assert digests(sender, wpb) == (1, digests(Sender(pb, wpb, control_stubs(other)[0]), wpb)[1])

    # A subset over it, rolled back and then committed: the shadow is that of version 1.
    name = "model.norm.weight"
    for step in (2, 3):
        sender.stage(step, {name: old[name]}, base=1)
        if step == 2:
            assert sender.stub.Rollback(wpb.RollbackRequest(version=sender.version(step)), timeout=30).dropped
            assert Reader(process.stub, request(pb)).read().logprobs == want.logprobs
    sender.commit(3)
    checkpoints.write(tmp_path / "mixed", dict(new) | {name: old[name]}, tiny_model)
    mixed = Reader(start_worker(tmp_path / "mixed").stub, request(pb)).read()
    assert Reader(process.stub, request(pb)).read().logprobs == mixed.logprobs


def kill_learner(process, sender, new, wpb, tiny_model):
    path = [str(pathlib.Path(__file__).parent), *[p for p in sys.path if p]]
    text = LEARNER.format(path=path, control=process.control, model=str(tiny_model))
    learner = subprocess.Popen([sys.executable, "-c", text])
    total = sum(len(data) for _, _, data in new.values())
    # A learner that ended by itself would be a broken test.
    assert eventually(lambda: sender.status().received_bytes > total // 3 or learner.poll() is not None)
    assert learner.poll() is None
    learner.send_signal(signal.SIGKILL)
    learner.wait()


def corrupt(process, sender, new, wpb, tiny_model):
    sender.begin(1, new)
    sender.push(1, new)
    name = next(iter(new))
    dtype, shape, data = new[name]
    wrong = dict(new) | {name: (dtype, shape, bytes([data[0] ^ 1]) + data[1:])}
    assert f"{name} (digest" in refused(grpc.StatusCode.DATA_LOSS, sender.verify, 1, wrong)
    assert sender.status().state == wpb.UPDATE_STATE_SERVING, "restored before the answer"


def not_finite(process, sender, new, wpb, tiny_model):
    name = "model.norm.weight"
    dtype, shape, data = new[name]
    value = b"\x80\x7f" if dtype == "BF16" else b"\0\0\x80\x7f"
    infinite = dict(new) | {name: (dtype, shape, value * (len(data) // len(value)))}
    sender.begin(1, infinite)
    sender.push(1, infinite)
    assert "NaN or infinite" in refused(grpc.StatusCode.DATA_LOSS, sender.verify, 1, infinite)


def let_the_lease_end(process, sender, new, wpb, tiny_model):
    sender.begin(1, new, lease_ms=3000)
    sender.push(1, new)
    sender.verify(1, new)


def roll_back(process, sender, new, wpb, tiny_model):
    sender.stage(1, new)
    assert sender.stub.Rollback(wpb.RollbackRequest(version=sender.version(1)), timeout=30).dropped


@pytest.mark.parametrize("end", [kill_learner, corrupt, not_finite, let_the_lease_end, roll_back])
def test_an_update_that_fails_has_never_been(armed, tiny_model, new, pb, wpb, end):
    process, sender = armed()
    want, before = Reader(process.stub, request(pb)).read(), digests(sender, wpb)
    reader = Reader(process.stub, request(pb)).read(until=20)
    end(process, sender, new, wpb, tiny_model)
    assert eventually(lambda: sender.status().state == wpb.UPDATE_STATE_SERVING)
    reader.read()
    assert (reader.tokens, reader.logprobs) == (want.tokens, want.logprobs), "the stream that stood still"
    assert spans(reader.done) == [(0, 0, 0, 150)]
    after = Reader(process.stub, request(pb)).read()
    assert (after.tokens, after.logprobs) == (want.tokens, want.logprobs)
    assert digests(sender, wpb) == before
    # And the next update is as if nothing had been.
    sender.stage(2, new)
    sender.commit(2)
    assert spans(Reader(process.stub, request(pb)).read().done) == [(2, 2, 0, 150)]


def test_finish_is_over_for_samples_that_stand_still(armed, new, pb, wpb):
    process, sender = armed()
    sender.begin(1, new)
    reader = Reader(process.stub, request(pb)).read(until=10)
    sender.push(1, new)
    sender.verify(1, new)
    finish = {"policy": wpb.IN_FLIGHT_POLICY_FINISH, "finish_timeout_ms": 60_000}
    details = refused(grpc.StatusCode.DEADLINE_EXCEEDED, sender.commit, 1, **finish)
    assert "1 samples stand still and cannot finish" in details
    assert sender.status().state == wpb.UPDATE_STATE_VERIFIED
    assert sender.commit(1, fallback=wpb.IN_FLIGHT_POLICY_RECOMPUTE, **finish).recomputed == 1
    assert [s[:2] for s in spans(reader.read().done)] == [(0, 0), (1, 1)]
    sender.stage(2, new)
    assert sender.commit(2, **finish).recomputed == 0, "none in flight: nothing to wait for"


def test_begin_waits_for_the_shadow(armed, new, pb, wpb):
    process, sender = armed("weights.shadow.before=sleep(1500)@2")  # the first is written at the start
    sender.stage(1, new)
    sender.commit(1)
    assert spans(Reader(process.stub, request(pb)).read().done) == [(1, 1, 0, 150)], "steps run beside it"
    status = sender.status()
    assert status.state == wpb.UPDATE_STATE_SERVING and status.shadow_total_bytes > 0
    begin = wpb.BeginRequest(version=sender.version(2), manifest=sender.manifest(new))
    with pytest.raises(grpc.RpcError) as error:
        sender.stub.Begin(begin, timeout=0.2)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    sender.stage(2, new)
    assert sender.status().shadow_total_bytes == 0
    sender.commit(2)


@pytest.mark.parametrize("place", ["restore.before", "restore.slot", "restore.after"])
def test_what_cannot_be_restored_never_serves(armed, new, pb, wpb, place):
    process, sender = armed(f"weights.{place}=error(INTERNAL)@1")
    watch = health_pb2_grpc.HealthStub(process.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    reader = Reader(process.stub, request(pb)).read(until=10)
    sender.begin(1, new)
    sender.push(1, new)
    rollback = wpb.RollbackRequest(version=sender.version(1))
    assert "could not be restored" in refused(grpc.StatusCode.INTERNAL, sender.stub.Rollback, rollback, timeout=30)
    reader.read()
    assert reader.done.abort_reason == pb.ABORT_REASON_INTERNAL
    assert spans(reader.done) == [(0, 0, 0, len(reader.tokens))], "no token of weights that may be mixed"
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert process.wait() == 1
    assert "could not be restored" in process.log()


def test_a_device_error_while_the_shadow_is_written_ends_the_worker(armed, new, pb, wpb):
    process, sender = armed("weights.shadow.after=error(INTERNAL)@2")
    sender.stage(1, new)
    sender.commit(1)
    assert process.wait() == 1
    assert "could not be copied" in process.log()

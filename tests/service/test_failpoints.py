"""Failpoints of the worker: what its environment arms, what it refuses, and errors that a learner then sees."""

import importlib
import os
import subprocess
import threading
import time

import grpc
import pytest
from checkpoints import perturb, read
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_weights import Reader, Sender, control_stubs, refused, request, spans


@pytest.fixture(scope="module")
def wpb(stubs):
    return importlib.import_module("lockstep.v1.weights_pb2")


@pytest.fixture
def armed(start_worker, tiny_model, monkeypatch):
    """armed(spec) -> a worker of the tiny checkpoint that was started with it."""

    def start(spec):
        monkeypatch.setenv("LOCKSTEP_FAILPOINTS", spec)
        return start_worker(tiny_model)

    return start


@pytest.mark.parametrize("spec", ["weights.never=kill", "weights.begin.before", "weights.push.staged=error(INTERNAL)"])
def test_a_wrong_spec_is_a_start_up_error(build_dir, tiny_model, spec):
    command = [build_dir / "bin" / "lockstep-worker", "--model", tiny_model]
    result = subprocess.run(command, env={**os.environ, "LOCKSTEP_FAILPOINTS": spec}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert spec in result.stderr and "weights.commit.installed" in result.stderr and "sleep(MS)" in result.stderr


def test_errors_at_every_stage_and_the_same_update_goes_on(armed, tiny_model, pb, wpb):
    stages = ("begin.answer", "push.before", "verify.before", "commit.before")
    process = armed(";".join(f"weights.{stage}=error(UNAVAILABLE)@1" for stage in stages))
    assert "will fail on purpose" in process.log()
    sender = Sender(pb, wpb, control_stubs(process)[0])
    new = perturb(read(tiny_model), 1)
    for stage, call in (
        ("begin.answer", lambda: sender.begin(1, new)),
        ("push.before", lambda: sender.push(1, new)),
        ("verify.before", lambda: sender.verify(1, new)),
        ("commit.before", lambda: sender.commit(1)),
    ):
        assert refused(grpc.StatusCode.UNAVAILABLE, call) == f"failpoint weights.{stage}"
        call()
    assert sender.status().weight_version.step == 1


def test_a_worker_killed_while_it_installs_was_never_of_two_versions(armed, tiny_model, pb, wpb):
    process = armed("weights.install.slot=kill@20")
    sender = Sender(pb, wpb, control_stubs(process)[0])
    new = perturb(read(tiny_model), 1)
    sender.stage(1, new)
    refused(grpc.StatusCode.UNAVAILABLE, sender.commit, 1)
    assert process.wait() == -9


def test_a_device_error_while_it_installs_ends_the_worker(armed, tiny_model, pb, wpb):
    process = armed("weights.install.slot=error(INTERNAL)@20")
    sender = Sender(pb, wpb, control_stubs(process)[0])
    new = perturb(read(tiny_model), 1)
    sender.stage(1, new)
    watch = health_pb2_grpc.HealthStub(process.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    reader = Reader(process.stub, request(pb)).read(until=10)
    refused(grpc.StatusCode.INTERNAL, sender.commit, 1)
    reader.read()
    assert reader.done.abort_reason == pb.ABORT_REASON_INTERNAL
    assert spans(reader.done) == [(0, 0, 0, len(reader.tokens))], "no token of weights that may be mixed"
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert process.wait() == 1


def test_digests_are_those_of_the_version_they_come_with(armed, tiny_model, pb, wpb):
    """Also between the moment when the new weights are in place and that when the version says so."""
    process = armed("weights.commit.installed=sleep(500)")
    sender = Sender(pb, wpb, control_stubs(process)[0])

    def ask():
        answer = sender.stub.GetDigests(wpb.GetDigestsRequest(), timeout=20)
        return answer.weight_version.step, {t.name: t.digest for t in answer.tensors}

    before = ask()
    sender.stage(1, perturb(read(tiny_model), 1))
    assert ask() == before
    commit = threading.Thread(target=sender.commit, args=(1,))
    commit.start()
    during = []
    while commit.is_alive():
        during.append(ask())
        time.sleep(0.01)
    after = ask()
    assert (before[0], after[0]) == (0, 1) and before[1] != after[1] and len(during) > 5
    assert all(answer in (before, after) for answer in during)

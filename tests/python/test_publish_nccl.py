"""The publisher over NCCL against real workers: the worker's own code path, with tests/fake_nccl in NCCL's place."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from lockstep import InvalidRequest, NcclError, UpdateFailed, WeightPublisher, _broadcast, parity
from lockstep._buckets import Piece, plan_buckets
from lockstep._nccl import Communicator
from lockstep.v1 import rollout_pb2, weights_pb2

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def start(start_worker, tiny_model, fake_nccl, request):
    started = []
    mode = ("--weights_receive", getattr(request, "param", "staged"))

    def one(*flags):
        flags = ("--numerics", "fp32", "--threads", "1", "--nccl_library", fake_nccl, *mode, *flags)
        started.append(start_worker(tiny_model, *flags))
        return started[-1]

    yield one
    for worker in started:
        worker.process.send_signal(signal.SIGCONT)
        worker.stop()


@pytest.fixture
def make(fake_nccl, trainer):
    publishers = []

    def one(workers, **options):
        options = {"manifest_from": trainer.model, "retry_s": 0.5, "timeout_s": 60} | options
        publishers.append(
            WeightPublisher(
                [w.control for w in workers], transport="nccl", nccl_library=fake_nccl, device="cpu", **options
            )
        )
        return publishers[-1]

    yield one
    for publisher in publishers:
        publisher.close()


in_both_modes = pytest.mark.parametrize("start", ["staged", "direct"], indirect=True)


@torch.no_grad()
def move(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)


def serves(trainer, worker):
    return parity.stale_weights(trainer, worker.control) == []


def test_plans_are_the_workers(repo_root):
    """The plans that weights_sync/bucket_plan_test.cc compares with as well."""
    golden = json.loads((repo_root / "tests" / "data" / "bucket_plan_golden.json").read_text())
    assert len(golden["plans"]) >= 5
    for plan in golden["plans"]:
        expected = [[Piece(*piece) for piece in bucket] for bucket in plan["buckets"]]
        assert plan_buckets(plan["bytes"], plan["bucket_bytes"]) == expected


@in_both_modes
def test_several_updates_in_one_group(start, make, trainer):
    workers = [start(), start()]
    publisher = make(workers)
    for step in (1, 2, 3):
        move(trainer.model, step)
        report = publisher.publish((0, step), trainer.tensors().items())
        assert [w.version for w in report.workers] == [(0, step)] * 2
        assert all(serves(trainer, worker) for worker in workers)
        assert all(w.push_s is not None for w in report.workers)


def test_every_dtype_is_rounded_on_arrival(start, make, trainer):
    """bfloat16 to a worker that holds float32, and back: digests say that nothing else came."""
    worker = start()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in trainer.tensors().items()}
    publisher = make([worker], manifest_from=[(n, t.dtype, t.shape) for n, t in half.items()])
    publisher.publish((0, 1), half.items())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    assert serves(trainer, worker)


def test_order_and_completeness(start, make, trainer):
    worker = start()
    publisher = make([worker])
    items = list(trainer.tensors().items())
    with pytest.raises(InvalidRequest, match="manifest's order"):
        publisher.publish((0, 1), items[1:] + items[:1])
    with pytest.raises(InvalidRequest, match="1 of the manifest never came"):
        publisher.publish((0, 1), items[:-1])
    assert publisher.publish((0, 1), items).workers[0].version == (0, 1)  # nothing is left of the two


@in_both_modes
def test_a_nan_is_found_by_the_worker(start, make, trainer):
    worker = start()
    publisher = make([worker])
    tensors = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    name = list(tensors)[5]
    tensors[name].view(-1)[3] = float("nan")
    with pytest.raises(UpdateFailed, match=f"{name} .1 values are NaN") as error:
        publisher.publish((0, 1), tensors.items())
    assert error.value.report.workers[0].failed_in == "verify"
    assert publisher.publish((0, 1), trainer.tensors().items()).workers[0].version == (0, 1)


@in_both_modes
def test_a_worker_that_dies_in_the_middle(start, make, trainer):
    """Without leave to go on: all keep the old version. With it, and tensors to send again: the others get the new."""
    workers = [start(), start(), start()]
    publisher = make(workers)
    publisher.publish((0, 1), trainer.tensors().items())

    def dying(victim):
        for i, item in enumerate(trainer.tensors().items()):
            if i == 20:
                victim.process.kill()
            yield item

    with pytest.raises(UpdateFailed) as error:
        publisher.publish((0, 2), dying(workers[2]))
    assert [w.version for w in error.value.report.workers] == [(0, 1), (0, 1), None]
    move(trainer.model, 1)
    sources = [lambda: dying(workers[1]), lambda: iter(trainer.tensors().items())]
    report = publisher.publish((0, 3), lambda: sources.pop(0)(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 3), None, None] and not sources
    assert serves(trainer, workers[0])


def test_a_restarted_worker_is_taken_into_the_next_update(start, make, trainer):
    first, second = start(), start()
    publisher = make([first, second])
    publisher.publish((0, 1), trainer.tensors().items())
    second.process.kill()
    second.process.wait()
    again = start("--control_listen", second.control)
    assert again.control == second.control
    move(trainer.model, 1)
    report = publisher.publish((0, 2), trainer.tensors().items())
    assert [w.version for w in report.workers] == [(0, 2)] * 2
    assert serves(trainer, again) and serves(trainer, first)


def test_a_worker_that_stands_still_ends_at_the_deadline(start, make, trainer):
    workers = [start(), start()]
    publisher = make(workers, timeout_s=4)
    publisher.publish((0, 1), trainer.tensors().items())
    workers[1].process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(UpdateFailed):
        publisher.publish((0, 2), trainer.tensors().items())
    assert time.monotonic() - began < 8
    workers[1].process.send_signal(signal.SIGCONT)
    report = make(workers).publish((0, 3), trainer.tensors().items())
    assert [w.version for w in report.workers] == [(0, 3)] * 2


LEARNER = """
import os, signal, sys
sys.path.insert(0, {python!r})
from lockstep import WeightPublisher
from lockstep.hf import TransformersTrainer
trainer = TransformersTrainer({model!r}, device="cpu", dtype="float32")
publisher = WeightPublisher({workers!r}, manifest_from=trainer.model, transport="nccl", nccl_library={library!r}, device="cpu")
def tensors():
    for i, item in enumerate(trainer.tensors().items()):
        if i == 20:
            print("in the middle", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
publisher.publish((0, 1), tensors())
"""


@in_both_modes
def test_a_learner_that_dies_in_the_middle(start, make, trainer, fake_nccl, tiny_model, repo_root, tmp_path):
    workers = [start(), start()]
    script = LEARNER.format(
        python=str(repo_root / "python"), model=str(tiny_model), workers=[w.control for w in workers], library=fake_nccl
    )
    path = pathlib.Path(tmp_path) / "learner.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.stdout == "in the middle\n" and done.returncode == -signal.SIGKILL, done.stderr
    # Its connection has ended: no wait for the lease. Another learner opens a new epoch.
    deadline = time.monotonic() + 5
    move(trainer.model, 3)
    publisher = make(workers)
    publisher.rollback((0, 1))
    report = publisher.publish((1, 0), trainer.tensors().items())
    assert time.monotonic() < deadline
    assert [w.version for w in report.workers] == [(1, 0)] * 2 and all(serves(trainer, worker) for worker in workers)


DIES_BETWEEN_COMMITS = """
import os, signal, sys, time
sys.path.insert(0, {python!r})
import torch
from lockstep import WeightPublisher
from lockstep.hf import TransformersTrainer
from lockstep.v1 import weights_pb2
class Dying(WeightPublisher):
    def _call(self, worker, method, request, deadline):
        if method == "Commit" and worker == self.workers[1]:
            while self._stub(self.workers[0]).GetStatus(weights_pb2.GetStatusRequest()).weight_version.step != 1:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._call(worker, method, request, deadline)
trainer = TransformersTrainer({model!r}, device="cpu", dtype="float32")
with torch.no_grad():
    for parameter in trainer.model.parameters():
        parameter.mul_(0.5)
Dying({workers!r}, manifest_from=trainer.model, **{options!r}).publish((0, 1), trainer.tensors().items())
"""


@in_both_modes
@pytest.mark.parametrize("transport", ["stream", "nccl"])
def test_the_same_version_again_after_a_learner_died_between_two_commits(
    start, trainer, fake_nccl, tiny_model, repo_root, tmp_path, transport
):
    workers = [start(), start()]
    addresses = [w.control for w in workers]
    options = {"nccl_library": fake_nccl, "device": "cpu"} if transport == "nccl" else {}
    options["transport"] = transport
    path = pathlib.Path(tmp_path) / "learner.py"
    path.write_text(
        DIES_BETWEEN_COMMITS.format(
            python=str(repo_root / "python"), model=str(tiny_model), workers=addresses, options=options
        )
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    with WeightPublisher(addresses, manifest_from=trainer.model, **options) as publisher:
        states = [status.state for status in publisher.status().values()]
        assert states == [weights_pb2.UPDATE_STATE_SERVING, weights_pb2.UPDATE_STATE_VERIFIED]
        report = publisher.publish((0, 1), trainer.tensors().items())
    assert [w.version for w in report.workers] == [(0, 1)] * 2
    assert all(serves(trainer, worker) for worker in workers)


def test_workers_that_fail_because_another_died_stay_in(start, make, trainer, monkeypatch):
    """NCCL's bootstrap tells the neighbours first: here one is told, and one dies in Join."""
    started = []
    for failpoint in ("error(UNAVAILABLE)@1", "kill@1", None):
        if failpoint:
            monkeypatch.setenv("LOCKSTEP_FAILPOINTS", f"weights.join.before={failpoint}")
        else:
            monkeypatch.delenv("LOCKSTEP_FAILPOINTS")
        started.append(start())
    report = make(started).publish((0, 1), trainer.tensors().items(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 1), None, (0, 1)]
    assert report.workers[1].failed_in == "push"
    assert serves(trainer, started[0]) and serves(trainer, started[2])


def test_a_worker_that_refuses_to_join_is_left_out(start, make, trainer, monkeypatch):
    first = start()
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", "weights.join.before=error(UNIMPLEMENTED)")
    second = start()
    report = make([first, second]).publish((0, 1), trainer.tensors().items(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 1), (0, 0)]
    assert second.log().count("failpoint weights.join.before=") == 1


def test_the_only_one_that_was_to_receive_dies(start, make, trainer, monkeypatch):
    first = start()
    make([first]).publish((0, 1), trainer.tensors().items())
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", "weights.join.before=kill@1")
    second = start()
    walked = []
    source = ((walked.append(name), (name, t))[1] for name, t in trainer.tensors().items())
    report = make([first, second]).publish((0, 1), source, allow_partial=True)
    assert [(w.version, w.failed_in) for w in report.workers] == [((0, 1), None), (None, "push")]
    assert len(walked) == len(trainer.tensors())


@pytest.mark.parametrize(
    "failpoint",
    ["weights.receive.before=sleep(5000)@1", "weights.receive.bucket=error(FAILED_PRECONDITION)@1"],
)
def test_whatever_fails_at_a_worker_is_reported(start, make, trainer, monkeypatch, failpoint):
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", failpoint)
    worker = start()
    with pytest.raises(UpdateFailed) as error:
        make([worker], timeout_s=3).publish((0, 1), trainer.tensors().items())
    assert error.value.report.workers[0].failed_in == "push" and error.value.report.workers[0].version == (0, 0)
    report = make([worker]).publish((0, 2), trainer.tensors().items())
    assert report.workers[0].version == (0, 2)


def test_a_group_that_failed_at_the_worker_alone_is_made_anew(start, make, trainer):
    worker = start()
    publisher = make([worker])
    publisher.publish((0, 1), trainer.tensors().items())
    group = publisher._groups._group
    stub, version = publisher._stub(worker.control), rollout_pb2.WeightVersion(step=2)
    stub.Begin(publisher._begin_request((0, 2)))
    receive = weights_pb2.ReceiveRequest(
        version=version, group="learner", generation=group.generation, bucket_bytes=group.bucket_bytes
    )
    call = stub.Receive(iter([receive]))
    next(iter(call))
    call.cancel()
    publisher.rollback((0, 2))
    assert publisher.publish((0, 3), trainer.tensors().items()).workers[0].version == (0, 3)


def test_the_others_go_on_without_one_that_stands_still(start, make, trainer):
    workers = [start(), start(), start()]
    publisher = make(workers, timeout_s=24)

    def stopping():
        for i, item in enumerate(trainer.tensors().items()):
            if i == 20:
                workers[1].process.send_signal(signal.SIGSTOP)
            yield item

    sources = [stopping, lambda: iter(trainer.tensors().items())]
    report = publisher.publish((0, 1), lambda: sources.pop(0)(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 1), None, (0, 1)]


@in_both_modes
def test_a_rollback_in_the_middle_ends_the_receive(start, make, trainer):
    worker = start()
    publisher, other = make([worker]), make([worker])

    def source():
        for i, item in enumerate(trainer.tensors().items()):
            if i == 20:
                other.rollback((0, 1))
            yield item

    with pytest.raises(UpdateFailed) as error:
        publisher.publish((0, 1), source())
    assert error.value.report.workers[0].failed_in == "push" and error.value.report.workers[0].version == (0, 0)
    assert publisher.publish((0, 2), trainer.tensors().items()).workers[0].version == (0, 2)


def test_a_slow_gather_keeps_its_lease(start, make, trainer):
    worker = start()
    publisher = make([worker], lease_s=1)

    def source():
        for i, item in enumerate(trainer.tensors().items()):
            if i == 20:
                time.sleep(2.5)
            yield item

    assert publisher.publish((0, 1), source()).workers[0].version == (0, 1)


def test_joining_longer_than_the_lease(start, make, trainer, monkeypatch):
    first = start()
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", "weights.join.before=sleep(3500)")
    second = start()
    report = make([first, second], lease_s=2).publish((0, 1), trainer.tensors().items())
    assert [w.version for w in report.workers] == [(0, 1)] * 2


@pytest.mark.parametrize("error", [RuntimeError("gather failed"), KeyboardInterrupt(), NcclError("its own NCCL")])
def test_the_iterators_own_error_stays_what_it_is(start, make, trainer, monkeypatch, error):
    """Also where ending the communicator takes so long that the workers' calls fail of it meanwhile."""
    abort = Communicator.abort

    def slow_abort(self):
        had = self.healthy
        abort(self)
        time.sleep(0.3 if had else 0.0)

    class Source:
        def __len__(self):
            return len(trainer.tensors())

        def __iter__(self):
            for i, item in enumerate(trainer.tensors().items()):
                if i == 40:
                    raise error
                yield item

    monkeypatch.setattr(Communicator, "abort", slow_abort)
    worker = start()
    publisher = make([worker])
    with pytest.raises(type(error)) as raised:
        publisher.publish((0, 1), Source())
    assert raised.value is error
    assert publisher.publish((0, 2), trainer.tensors().items()).workers[0].version == (0, 2)


def test_an_interrupt_while_joins_are_awaited_aborts_the_communicator(fake_nccl, monkeypatch):
    made = []

    class FakeCommunicator:
        def __init__(self, *_, **__):
            self.healthy = True
            made.append(self)

        def abort(self):
            self.healthy = False

    class Join:
        cancelled = False

        def future(self, request, timeout):
            return self

        def result(self):
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True

    monkeypatch.setattr(_broadcast, "Communicator", FakeCommunicator)
    stub = types.SimpleNamespace(Join=Join())
    with pytest.raises(KeyboardInterrupt):
        _broadcast.Groups(fake_nccl, "cpu", 0).make({"a:1": stub}, time.monotonic() + 10)
    assert [comm.healthy for comm in made] == [False] and stub.Join.cancelled


@in_both_modes
def test_the_stream_and_nccl_take_turns(start, make, trainer):
    worker = start()
    over_nccl = make([worker])
    with WeightPublisher(worker.control, manifest_from=trainer.model) as over_stream:
        for step in range(1, 5):
            move(trainer.model, step)
            publisher = over_nccl if step % 2 else over_stream
            assert publisher.publish((0, step), trainer.tensors().items()).workers[0].version == (0, step)
            assert serves(trainer, worker)

"""WeightPublisher against weights.proto's service in Python: all or nothing, whatever fails."""

import signal
import threading
import time

import grpc
import numpy as np
import pytest
import torch
from dropping_proxy import DroppingProxy
from fake_weights import FakeWeights

import lockstep
from lockstep import RollbackFailed, UpdateFailed, WeightPublisher, WorkerUnavailable
from lockstep.publisher import manifest_of
from lockstep.v1 import weights_pb2

Code = grpc.StatusCode


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": ((300, 64), torch.bfloat16),
        "norm": ((64,), torch.float32),
        "w": ((129, 257), torch.float32),
        "scalar": ((), torch.float16),
        "head": ((64, 1111), torch.bfloat16),
    }
    return {name: torch.randn(shape, generator=g).to(dtype) for name, (shape, dtype) in shapes.items()}


SPECS = manifest_of([(n, t.dtype, t.shape) for n, t in tensors().items()])
TOTAL = sum(spec.bytes for spec in SPECS)


@pytest.fixture
def fleet():
    workers = [FakeWeights(SPECS).start() for _ in range(3)]
    yield workers
    for worker in workers:
        worker.server.stop(None)


def make(fleet, **options):
    options = {"retry_s": 1.0, "timeout_s": 30, "batch_bytes": 50_000} | options
    return WeightPublisher([w.address for w in fleet], manifest_from=SPECS, **options)


def holds(worker, values):
    return all(
        worker.weights[n].tobytes() == t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in values.items()
    )


def test_publish(fleet):
    with make(fleet) as publisher:
        report = publisher.publish((0, 1), reversed(tensors(1).items()))
        assert [w.version for w in report.workers] == [(0, 1)] * 3 and not report.failed
        assert report.bytes == TOTAL and report.tensors == 5
        assert all(w.pause_ms == 1.5 and w.recomputed == 2 and w.push_s > 0 for w in report.workers)
        assert all(holds(w, tensors(1)) and w.policy[0] == weights_pb2.IN_FLIGHT_POLICY_RECOMPUTE for w in fleet)
        numpy_values = {n: t.numpy() for n, t in tensors(2).items() if t.dtype != torch.bfloat16}
        publisher.publish(
            (1, 0), (tensors(2) | numpy_values).items(), policy="finish", finish_timeout_s=2, fallback="abort"
        )
        assert all(holds(w, tensors(2)) for w in fleet)
        assert fleet[0].policy == (weights_pb2.IN_FLIGHT_POLICY_FINISH, 2000, weights_pb2.IN_FLIGHT_POLICY_ABORT)
        assert {s.weight_version.epoch for s in publisher.status().values()} == {1}
        for answer in publisher.digests(["w"]).values():
            assert [t.digest for t in answer.tensors] == [lockstep.digest(tensors(2)["w"])]


def test_order_of_stages(fleet):
    """No byte moves before all have accepted, none commits before all have verified."""
    log = []
    for i, worker in enumerate(fleet):
        worker.delay = {"Begin": 0.1 * i, "Verify": 0.1 * i}
        enter = worker.enter
        worker.enter = lambda name, context, i=i, enter=enter: (enter(name, context), log.append(name))
    pulled = []

    def source():
        pulled.append(log.count("Begin"))
        yield from tensors(1).items()

    make(fleet).publish((0, 1), source())
    assert pulled == [3]
    names = [name for name in log if name in ("Begin", "Push", "Verify", "Commit")]
    stages = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert stages == ["Begin", "Push", "Verify", "Begin", "Commit"], "all are asked once more before any commits"


@pytest.mark.parametrize("stage", ["Begin", "Push", "Verify"])
@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.UNAVAILABLE])
def test_a_failure_before_commit_rolls_back_everywhere(fleet, stage, code):
    fleet[1].fail = {stage: (code, -1)}
    walked = []
    source = ((walked.append(n), (n, t))[1] for n, t in tensors(1).items())
    with pytest.raises(UpdateFailed, match="1 of 3 workers failed") as error:
        make(fleet).publish((0, 1), source)
    report = error.value.report
    assert [w.worker for w in report.failed] == [fleet[1].address]
    assert report.failed[0].failed_in == stage.lower() and report.failed[0].error.code == code
    assert report.failed[0].error.worker == fleet[1].address
    assert all(w.open is None and w.version == (0, 0) and not holds(w, tensors(1)) for w in fleet)
    assert [w.version for w in report.workers] == [(0, 0)] * 3
    assert len(walked) == 5, "other ranks gather along"
    fleet[1].fail = {}
    make(fleet).publish((0, 1), tensors(1).items())
    assert all(holds(w, tensors(1)) for w in fleet)


def test_corrupted_bytes_are_data_loss(fleet):
    fleet[2].corrupt = True
    with pytest.raises(UpdateFailed, match="DATA_LOSS: digests differ: .'embed'"):
        make(fleet).publish((0, 1), tensors(1).items())
    assert all(w.version == (0, 0) and w.open is None for w in fleet)


def test_allow_partial(fleet):
    fleet[0].fail = {"Push": (Code.INTERNAL, -1)}
    report = make(fleet).publish((0, 1), tensors(1).items(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 0), (0, 1), (0, 1)] and len(report.failed) == 1
    assert fleet[0].open is None and fleet[0].calls.count("Rollback") == 1, (
        "it would hold what arrived until its lease ends"
    )
    for worker in fleet:
        worker.fail = {"Begin": (Code.INTERNAL, -1)}
    with pytest.raises(UpdateFailed, match="3 of 3"):
        make(fleet).publish((0, 2), tensors(1).items(), allow_partial=True)


def test_commit_that_fails_is_reported_and_can_be_repeated(fleet):
    fleet[1].fail = {"Commit": (Code.DEADLINE_EXCEEDED, 1)}
    publisher = make(fleet)
    with pytest.raises(UpdateFailed) as error:
        publisher.publish((0, 1), tensors(1).items(), policy="finish", finish_timeout_s=1)
    assert [w.version for w in error.value.report.workers] == [(0, 1), (0, 0), (0, 1)]
    assert "Rollback" not in fleet[1].calls
    report = publisher.commit((0, 1), policy="abort")
    assert [w.version for w in report.workers] == [(0, 1)] * 3 and holds(fleet[1], tensors(1))


def test_a_broken_stream_goes_on_where_it_broke(fleet):
    fleet[1].break_after = [20_000, 0, 70_000, 10]
    report = make(fleet[:2], batch_bytes=1 << 20).publish((0, 1), tensors(1).items())
    assert report.workers[1].resumed == 4 and report.workers[0].resumed == 0
    assert fleet[1].pushed == TOTAL, "no byte is taken twice"
    assert holds(fleet[1], tensors(1))


def test_a_lost_connection_is_survived(fleet):
    proxy = DroppingProxy(fleet[0].address)
    proxy.limit_bytes = 120_000
    big = {n: t for n, t in tensors(1).items()}
    publisher = WeightPublisher(proxy.address, manifest_from=SPECS, retry_s=10, timeout_s=30)
    report = publisher.publish((0, 1), big.items())
    assert report.workers[0].resumed >= 1 and holds(fleet[0], big)
    proxy.close()


def test_the_lease_is_kept_while_the_iterator_is_slow(fleet):
    def slow():
        for name, tensor in tensors(1).items():
            time.sleep(0.5)
            yield name, tensor

    make(fleet, lease_s=1.0, batch_bytes=1 << 20).publish((0, 1), slow())
    assert all(w.version == (0, 1) for w in fleet)


@pytest.mark.parametrize("stage", ["Begin", "Verify"])
def test_the_lease_is_kept_while_others_are_slow(fleet, stage):
    """Who is done with a stage waits for the slowest: here for longer than the lease."""
    enter = fleet[1].enter

    def slow(name, context):
        enter(name, context)
        if name == stage and fleet[1].calls.count(name) == 1:
            for _ in range(35):
                time.sleep(0.1)
                fleet[1].lease_end = time.monotonic() + 2.0  # a worker does not drop what it works on

    fleet[1].enter = slow
    report = make(fleet[:2], lease_s=2.0).publish((0, 1), tensors(1).items())
    assert [w.version for w in report.workers] == [(0, 1)] * 2
    assert fleet[0].calls.count("Begin") > 2


@pytest.mark.parametrize("allow_partial", [False, True])
def test_an_update_that_is_lost_after_verify_fails_before_any_commit(fleet, allow_partial):
    """As by a lease that ends, or a restart, while the others verify."""
    enter = fleet[1].enter

    def losing(name, context):
        if name == "Begin" and "Verify" in fleet[1].calls:
            with fleet[1].lock:
                fleet[1].drop()
        enter(name, context)

    fleet[1].enter = losing
    if allow_partial:
        report = make(fleet).publish((0, 1), tensors(1).items(), allow_partial=True)
    else:
        with pytest.raises(UpdateFailed, match="the worker lost the update before Commit") as error:
            make(fleet).publish((0, 1), tensors(1).items())
        report = error.value.report
    new = (0, 1) if allow_partial else (0, 0)
    assert [w.version for w in report.workers] == [new, (0, 0), new]
    assert [(w.worker, w.failed_in) for w in report.failed] == [(fleet[1].address, "confirm")]
    assert all(w.open is None for w in fleet) and "Commit" not in fleet[1].calls


def test_an_interrupt_while_the_last_batch_is_sent(fleet):
    """It ends every thread of the update, and nothing opens the update again."""
    pushing, go_on = threading.Event(), threading.Event()
    enter = fleet[1].enter

    def waiting(name, context):
        enter(name, context)
        if name == "Push":
            pushing.set()
            go_on.wait(30)

    def interrupt():
        pushing.wait(30)
        time.sleep(0.3)  # publish() waits for the senders by then; it makes no difference where it is
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    fleet[1].enter = waiting
    interrupter = threading.Thread(target=interrupt)
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            make(fleet, lease_s=1.0, batch_bytes=1 << 20).publish((0, 1), tensors(1).items())
        interrupter.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(w.open is None and w.calls.count("Rollback") == 1 for w in fleet)
    go_on.set()
    deadline = time.monotonic() + 20
    while any("sender" in t.name or "renew_all" in t.name for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(w.open is None and "Begin" not in w.calls[w.calls.index("Rollback") :] for w in fleet)


def test_no_more_is_sent_once_the_update_has_failed(fleet):
    """The others are rolled back while the iterator is walked on: in direct mode they stand still until then."""
    fleet[1].fail = {"Push": (Code.INTERNAL, -1)}
    walked = []

    def source():
        for name, tensor in tensors(1).items():
            yield name, tensor
            walked.append((name, "Rollback" in fleet[0].calls))
            deadline = time.monotonic() + 20
            while fleet[1].calls.count("Push") == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)

    with pytest.raises(UpdateFailed, match="1 of 3 workers failed"):
        make(fleet, batch_bytes=1).publish((0, 1), source())
    assert [name for name, _ in walked] == list(tensors()) and walked[-1][1]
    assert fleet[0].pushed < TOTAL


def test_a_commit_that_is_refused_is_rolled_back_there(fleet):
    fleet[1].fail = {"Commit": (Code.INVALID_ARGUMENT, -1)}
    with pytest.raises(UpdateFailed) as error:
        make(fleet).publish((0, 1), tensors(1).items())
    assert [w.version for w in error.value.report.workers] == [(0, 1), (0, 0), (0, 1)]
    assert fleet[1].open is None and fleet[1].calls.count("Rollback") == 1


def test_a_version_that_serves_is_sent_nothing_and_the_report_says_so(fleet):
    make(fleet[:1]).publish((0, 1), tensors(1).items())
    report = make(fleet[:2]).publish((0, 1), tensors(2).items())
    assert [w.served_before for w in report.workers] == [True, False]
    assert f"{fleet[0].address}: serves (0, 1) as it did before: nothing was sent\n" in str(report)
    assert str(report).count("nothing was sent") == 1 and holds(fleet[0], tensors(1)) and holds(fleet[1], tensors(2))


@pytest.mark.parametrize("version", [5, (0, 1.5), (0, 2**63), (0, -1), ("0", "1"), (0, 1, 2), None])
def test_a_wrong_version_is_named_after_the_iterator_was_walked(fleet, version):
    walked = []
    source = ((walked.append(n), (n, t))[1] for n, t in tensors(1).items())
    with pytest.raises(lockstep.InvalidRequest) as error:
        make(fleet).publish(version, source)
    assert f"version: {version!r}, want (epoch, step), whole numbers from 0 to" in str(error.value)
    assert len(walked) == 5, "other ranks gather along"
    assert not any(w.calls for w in fleet)


@pytest.mark.parametrize(
    "item,text",
    [
        (("w", [1.0]), r"tensors: 'w' is list \[1.0\], want a torch tensor or a numpy array"),
        ("w", r"tensors: the iterator gave str 'w', want \(name, tensor\)"),
        ((3, torch.zeros(3)), r"tensors: the iterator gave tuple \(3, tensor"),
    ],
)
def test_what_is_no_tensor_is_named(fleet, item, text):
    walked = []
    source = ((walked.append(i), i)[1] for i in [item, *tensors(1).items()])
    with pytest.raises(lockstep.InvalidRequest, match=text):
        make(fleet).publish((0, 1), source)
    assert len(walked) == 6 and all(w.open is None for w in fleet)


def test_the_iterators_own_error_rolls_back(fleet):
    def broken():
        yield "embed", tensors(1)["embed"]
        raise RuntimeError("gather failed")

    with pytest.raises(RuntimeError, match="gather failed"):
        make(fleet).publish((0, 1), broken())
    assert all(w.open is None for w in fleet)


@pytest.mark.parametrize(
    "change,text",
    [
        (lambda d: d.pop("w"), "1 of the manifest never came: w"),
        (lambda d: d.update(extra=torch.zeros(3)), "'extra' is not in the manifest"),
        (
            lambda d: d.update(norm=torch.zeros(64, dtype=torch.float16)),
            r"'norm' is float16 \(64,\), the manifest says",
        ),
        (lambda d: d.update(w=torch.zeros(257, 129)), r"the manifest says float32 \(129, 257\)"),
    ],
)
def test_tensors_must_be_the_manifests(fleet, change, text):
    values = tensors(1)
    change(values)
    with pytest.raises(lockstep.InvalidRequest, match=text):
        make(fleet).publish((0, 1), values.items())
    assert all(w.open is None and w.version == (0, 0) for w in fleet)


def test_a_reused_buffer_does_no_harm(fleet):
    """The iterator may hand out one gather buffer again and again."""
    buffer = torch.empty(300 * 300, dtype=torch.float32)

    def reusing():
        for name, tensor in tensors(1).items():
            view = buffer.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(float("nan"))

    make(fleet).publish((0, 1), reusing())
    assert all(holds(w, tensors(1)) for w in fleet)


def test_non_senders_only_walk(fleet):
    walked = []
    source = ((walked.append(n), (n, t))[1] for n, t in tensors(1).items())
    assert make(fleet).publish((0, 1), source, send=False) is None
    assert len(walked) == 5 and not any(w.calls for w in fleet)


def test_a_hanging_worker_meets_the_deadline(fleet):
    fleet[0].delay = {"Verify": 5}
    begin = time.monotonic()
    with pytest.raises(UpdateFailed, match="DEADLINE_EXCEEDED"):
        make(fleet, timeout_s=1.5).publish((0, 1), tensors(1).items())
    assert time.monotonic() - begin < 4.5
    assert [w.version for w in fleet] == [(0, 0)] * 3


@pytest.mark.parametrize("stage", ["Begin", "Push", "Verify"])
def test_the_others_commit_in_time_when_one_hangs(fleet, stage):
    fleet[0].delay = {stage: 10}
    report = make(fleet, timeout_s=9).publish((0, 1), tensors(1).items(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 0), (0, 1), (0, 1)]
    assert [(w.failed_in, w.error.code) for w in report.failed] == [(stage.lower(), Code.DEADLINE_EXCEEDED)]
    assert all(holds(w, tensors(1)) for w in fleet[1:])


def test_one_that_stands_still_after_its_commit_is_waited_for(fleet):
    fleet[1].delay = {"GetStatus": 2.5}  # of timeout_s a quarter is kept for questions after a failure
    report = make(fleet, timeout_s=8).publish((0, 1), tensors(1).items())
    assert [w.version for w in report.workers] == [(0, 1)] * 3


def test_a_long_call_is_made_again_when_its_connection_breaks_late(fleet):
    fleet[1].delay, fleet[1].fail = {"Commit": 1.5}, {"Commit": (Code.UNAVAILABLE, 1)}
    report = make(fleet, retry_s=1.0).publish((0, 1), tensors(1).items())
    assert [w.version for w in report.workers] == [(0, 1)] * 3


def test_what_another_learner_sent_of_the_version_is_not_sent_again(fleet):
    """One that died between two Commits: some serve the version, some are VERIFIED, some have a part."""
    fleet[1].fail = {"Commit": (Code.INTERNAL, 1)}
    with pytest.raises(UpdateFailed):
        make(fleet).publish((0, 1), tensors(1).items())
    assert fleet[1].state == weights_pb2.UPDATE_STATE_VERIFIED
    report = make(fleet).publish((0, 1), tensors(1).items())
    assert [w.version for w in report.workers] == [(0, 1)] * 3 and holds(fleet[1], tensors(1))
    assert fleet[1].pushed == TOTAL

    fleet[1].break_after, fleet[1].fail = [30_000], {"Rollback": (Code.INTERNAL, 1)}
    fleet[2].fail = {"Push": (Code.INTERNAL, 1)}
    with pytest.raises(UpdateFailed):
        make(fleet[1:], batch_bytes=1 << 20).publish((0, 2), tensors(2).items())
    before = sum(fleet[1].open["received"])
    assert before >= 30_000
    make(fleet).publish((0, 2), tensors(2).items())
    assert all(holds(w, tensors(2)) for w in fleet) and fleet[1].pushed == 2 * TOTAL


def test_one_that_is_gone_keeps_none_of_the_others_from_being_asked(fleet):
    gone, other, opened = (w.address for w in fleet)
    publisher = make(fleet, retry_s=0.2)
    publisher._stub(opened).Begin(publisher._begin_request((0, 1)))
    fleet[0].server.stop(None).wait()
    with pytest.raises(RollbackFailed, match="1 of 3 workers failed\n  UNAVAILABLE: ") as error:
        publisher.rollback((0, 1))
    results = error.value.results
    assert isinstance(results[gone], WorkerUnavailable) and results[gone].worker == gone
    assert (results[other], results[opened]) == (False, True) and fleet[2].open is None
    for answers in (publisher.status(), publisher.digests(["w"])):
        assert list(answers) == [gone, other, opened] and isinstance(answers[gone], WorkerUnavailable)
        assert not any(isinstance(answers[w], lockstep.LockstepError) for w in (other, opened))


def test_wrong_arguments(fleet):
    with pytest.raises(lockstep.InvalidRequest, match="'rdma', want 'stream' or 'nccl'"):
        make(fleet, transport="rdma")
    with pytest.raises(lockstep.LockstepError, match="/no/such/libnccl.so"):
        make(fleet, transport="nccl", nccl_library="/no/such/libnccl.so")
    with pytest.raises(lockstep.InvalidRequest, match="int64"):
        manifest_of([("a", torch.int64, (3,))])
    with pytest.raises(lockstep.InvalidRequest, match="named twice: .'a'"):
        manifest_of([("a", "float32", (3,)), ("a", "float32", (3,))])
    for options, text in (
        ({"policy": "wait"}, "policy: 'wait'"),
        ({"policy": "keep", "fallback": "abort"}, "takes no"),
        ({"policy": "finish", "fallback": "finish"}, "fallback: 'finish'"),
        ({"policy": ["keep"]}, r"policy: \['keep'\]"),
        ({"policy": "finish", "finish_timeout_s": 4000}, "finish_timeout_s: 4000, want a number from 0 to 3,600"),
        ({"policy": "finish", "finish_timeout_s": -5.0}, "finish_timeout_s: -5.0, want"),
        ({"policy": "finish", "finish_timeout_s": float("nan")}, "finish_timeout_s: nan, want"),
        ({"policy": "finish", "finish_timeout_s": "5"}, "finish_timeout_s: '5', want"),
    ):
        with pytest.raises(lockstep.InvalidRequest, match=text):
            make(fleet).publish((0, 1), tensors(1).items(), **options)
    for options, text in (
        ({"lease_s": 0.5}, r"lease_s: 0.5, want a number from 1 to 3,600 \(0: 60\)"),
        ({"lease_s": 3601}, "lease_s: 3601, want"),
        ({"lease_s": -1}, "lease_s: -1, want"),
        ({"timeout_s": 0}, "timeout_s: 0, want a number from 0.001 to 1,000,000"),
        ({"retry_s": float("inf")}, "retry_s: inf, want a number from 0 to 1,000,000"),
        ({"batch_bytes": 0}, "batch_bytes: 0, want a whole number from 1 to"),
        ({"batch_bytes": 1e6}, "batch_bytes: 1000000.0, want a whole number"),
        ({"max_ctas": 65}, "max_ctas: 65, want a whole number from 0 to 64"),
        ({"base_version": 3}, r"base_version: 3, want \(epoch, step\)"),
    ):
        with pytest.raises(lockstep.InvalidRequest, match=text):
            make(fleet, **options)
    assert not any(w.calls for w in fleet)
    assert make(fleet, lease_s=0)._begin_request((0, 1)).lease_ms == 60_000
    with pytest.raises(lockstep.InvalidRequest, match="version: 5, want"):
        make(fleet).rollback(5)
    model = torch.nn.Linear(3, 2)
    assert manifest_of(model) == manifest_of([("weight", "float32", (2, 3)), ("bias", np.dtype("float32"), (2,))])


def test_memory_is_bounded(fleet):
    """A slow worker slows the iterator down: what waits is a few batches."""
    fleet[0].delay = {"Push": 0.2}
    alive, most = [], [0]
    lock = threading.Lock()
    specs = manifest_of([(f"t{i}", "float32", (25_000,)) for i in range(30)])
    workers = [FakeWeights(specs).start() for _ in range(2)]
    workers[0].delay = {"Push": 0.05}

    def source():
        for i in range(30):
            with lock:
                alive.append(i)
                done = sum(r == 100_000 for r in workers[0].open["received"])
                most[0] = max(most[0], len(alive) - done)
            yield f"t{i}", torch.full((25_000,), float(i))

    addresses = [w.address for w in workers]
    WeightPublisher(addresses, manifest_from=specs, batch_bytes=100_000).publish((0, 1), source())
    assert most[0] <= 4
    for worker in workers:
        worker.server.stop(None)

"""The publisher against a real worker: its digests, its versions, and what generation then computes."""

import signal
import threading
import time

import grpc
import numpy as np
import pytest
import torch
from dropping_proxy import DroppingProxy

from lockstep import RolloutClient, SamplingParams, UpdateFailed, WeightPublisher, parity
from lockstep import publisher as publisher_module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def workers(start_worker, tiny_model, request):
    flags = ("--numerics", "fp32", "--threads", "1", "--weights_receive", getattr(request, "param", "staged"))
    started = [start_worker(tiny_model, *flags) for _ in range(2)]
    yield started
    for worker in started:
        worker.stop()


in_both_modes = pytest.mark.parametrize("workers", ["staged", "direct"], indirect=True)


@torch.no_grad()
def move(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)


@in_both_modes
def test_published_weights_are_the_trainers(workers, trainer):
    """Parity before, stale after the trainer's step, parity again under the new version."""
    strict = parity.Thresholds(mean=1e-5, max=1e-3)
    first = workers[0]
    with (
        RolloutClient(first.data) as client,
        WeightPublisher([w.control for w in workers], manifest_from=trainer.model) as publisher,
    ):
        assert parity.check(client, trainer, thresholds=strict, control=first.control, count=4).passed
        move(trainer.model, 1)
        stale = parity.check(client, trainer, thresholds=strict, control=first.control, count=4)
        assert not stale.passed and stale.findings[0].startswith("stale weights: ")
        report = publisher.publish((0, 1), trainer.tensors().items())
        assert [w.version for w in report.workers] == [(0, 1)] * 2
        fresh = parity.check(client, trainer, thresholds=strict, control=first.control, count=4)
        assert fresh.passed and not fresh.findings and fresh.weight_version == (0, 1), str(fresh)


@in_both_modes
def test_versions_under_traffic(workers, trainer, pb):
    """Samples that an update falls into say which tokens are whose; min_weight_version holds."""
    with (
        RolloutClient([w.data for w in workers]) as client,
        WeightPublisher([w.control for w in workers], manifest_from=trainer.model) as publisher,
    ):
        result = {}
        params = SamplingParams(seed=1, max_tokens=4000, ignore_eos=True)
        thread = threading.Thread(target=lambda: result.update(r=client.generate([[i + 2] for i in range(6)], params)))
        move(trainer.model, 2)
        thread.start()
        deadline = time.monotonic() + 60
        while sum(w.stub.GetLoad(pb.GetLoadRequest(), timeout=10).running_sequences for w in workers) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        report = publisher.publish((0, 1), trainer.tensors().items(), policy="recompute")
        assert sum(w.recomputed for w in report.workers) == 6
        later = client.generate([[5, 6]], SamplingParams(max_tokens=10, ignore_eos=True), min_weight_version=(0, 1))
        thread.join(120)
        assert [span.weights for span in later[0].version_spans] == [(0, 1)]
        for sample in result["r"]:
            assert [span.weights for span in sample.version_spans] == [(0, 0), (0, 1)] and not sample.mixed_state
            (_, middle), (begin, end) = ((s.begin, s.end) for s in sample.version_spans)
            assert middle == begin and end == 4000
            if sample.worker == workers[0].data:  # tokens of the second span are what the new weights compute
                sequence = np.concatenate([[sample.prompt_index + 2], sample.tokens])
                difference = np.abs(trainer(sequence)[begin:] - sample.logprobs_by_kind["temperature"][begin:])
                assert difference.mean() < 1e-5


@in_both_modes
def test_a_worker_that_dies_rolls_the_others_back(workers, trainer):
    with WeightPublisher([w.control for w in workers], manifest_from=trainer.model, retry_s=0.5) as publisher:

        def source():
            for i, item in enumerate(trainer.tensors().items()):
                if i == 20:
                    workers[1].process.kill()
                yield item

        with pytest.raises(UpdateFailed) as error:
            publisher.publish((0, 1), source())
        assert [w.version for w in error.value.report.workers] == [(0, 0), None]
        report = publisher.publish((0, 2), trainer.tensors().items(), allow_partial=True)
        assert [w.version for w in report.workers] == [(0, 2), None]


@in_both_modes
def test_a_broken_connection_goes_on(workers, trainer):
    proxy = DroppingProxy(workers[0].control)
    proxy.limit_bytes = 6_000_000
    with WeightPublisher(proxy.address, manifest_from=trainer.model, retry_s=10) as publisher:
        report = publisher.publish((0, 1), trainer.tensors().items())
    assert report.workers[0].version == (0, 1) and report.workers[0].resumed >= 1
    assert parity.stale_weights(trainer, workers[0].control) == []
    proxy.close()


def test_a_worker_that_stands_still_does_not_hold_publish_past_its_limit(workers, trainer):
    with WeightPublisher(
        [w.control for w in workers], manifest_from=trainer.model, timeout_s=2, retry_s=1
    ) as publisher:
        workers[1].process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(UpdateFailed):
            publisher.publish((0, 1), trainer.tensors().items())
        assert time.monotonic() - began < 4
        workers[1].process.send_signal(signal.SIGCONT)


def test_a_worker_that_is_silent_is_given_up_long_before_the_limit(workers, trainer, monkeypatch):
    """With all its times a tenth of what they are."""
    tenth = ("grpc.keepalive", "grpc.http2.ping_timeout", "grpc.min_reconnect")
    options = [(name, v // 10 if name.startswith(tenth) else v) for name, v in publisher_module._CHANNEL_OPTIONS]
    monkeypatch.setattr(publisher_module, "_CHANNEL_OPTIONS", options)

    def source():
        for i, item in enumerate(trainer.tensors().items()):
            if i == 20:
                workers[1].process.send_signal(signal.SIGSTOP)
            yield item

    began = time.monotonic()
    with WeightPublisher(
        [w.control for w in workers], manifest_from=trainer.model, timeout_s=100, retry_s=1, batch_bytes=1 << 20
    ) as publisher:
        report = publisher.publish((0, 1), source(), allow_partial=True)
    assert [w.version for w in report.workers] == [(0, 1), None]
    assert report.workers[1].failed_in == "push" and report.workers[1].error.code == grpc.StatusCode.UNAVAILABLE
    assert report.workers[1].push_s < 15 and time.monotonic() - began < 40
    workers[1].process.send_signal(signal.SIGCONT)


def test_success_means_that_all_serve_the_version(start_worker, tiny_model, trainer, monkeypatch):
    """A worker that died after its Commit, while another's went on, came back with the checkpoint's weights."""
    flags = ("--numerics", "fp32", "--threads", "1")
    first = start_worker(tiny_model, *flags)
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", "weights.commit.before=sleep(4000)@1")
    second = start_worker(tiny_model, *flags)
    monkeypatch.delenv("LOCKSTEP_FAILPOINTS")
    with (
        WeightPublisher(first.control, manifest_from=trainer.model) as only_first,
        WeightPublisher([first.control, second.control], manifest_from=trainer.model) as publisher,
    ):

        def restart_once_committed():
            while only_first.status()[first.control].weight_version.step != 1:
                time.sleep(0.02)
            first.process.kill()
            first.process.wait()
            start_worker(tiny_model, *flags, "--listen", first.data, "--control_listen", first.control)

        thread = threading.Thread(target=restart_once_committed)
        thread.start()
        with pytest.raises(UpdateFailed) as error:
            publisher.publish((0, 1), trainer.tensors().items())
        thread.join()
        assert [(w.version, w.failed_in) for w in error.value.report.workers] == [((0, 0), "commit"), ((0, 1), None)]
        report = publisher.publish((0, 2), trainer.tensors().items())
        assert [w.version for w in report.workers] == [(0, 2)] * 2


def test_a_connection_that_breaks_during_commit(start_worker, tiny_model, trainer, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", "weights.install.before=sleep(1500)@1")
    worker = start_worker(tiny_model, "--numerics", "fp32", "--threads", "1")
    proxy = DroppingProxy(worker.control)
    with WeightPublisher(proxy.address, manifest_from=trainer.model) as publisher:

        def drop_while_it_installs():
            while "failpoint weights.install.before" not in worker.log():
                time.sleep(0.02)
            assert proxy.drop()

        thread = threading.Thread(target=drop_while_it_installs)
        thread.start()
        report = publisher.publish((0, 1), trainer.tensors().items())
        thread.join()
    assert report.workers[0].version == (0, 1)
    proxy.close()


@pytest.mark.parametrize("already", [1, 2])
def test_a_version_that_some_workers_have_is_sent_to_the_others(workers, trainer, already):
    """As after a learner that died within Commit: the same version again is the way to one version everywhere."""
    move(trainer.model, 1)
    with WeightPublisher([w.control for w in workers[:already]], manifest_from=trainer.model) as publisher:
        publisher.publish((0, 1), trainer.tensors().items())
    with WeightPublisher([w.control for w in workers], manifest_from=trainer.model) as publisher:
        report = publisher.publish((0, 1), trainer.tensors().items())
    assert [w.version for w in report.workers] == [(0, 1)] * 2
    assert [w.push_s is None for w in report.workers] == [i < already for i in range(2)]
    for worker in workers:
        assert parity.stale_weights(trainer, worker.control) == []

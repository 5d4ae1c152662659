"""tools/chaos: that its checks see what they are for. A short campaign, whose records are tampered with."""

import importlib.machinery
import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def chaos(repo_root):
    sys.path[:0] = [str(repo_root / "tools"), str(repo_root / "python")]
    loader = importlib.machinery.SourceFileLoader("chaos", str(repo_root / "tools" / "chaos"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("chaos", loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def campaign(chaos, build_dir, tmp_path_factory):
    """One that is over: two updates of two workers, no fault."""
    binary = str(build_dir / "bin" / "lockstep-worker")
    sys.argv = ["chaos", "--worker", binary, "--updates", "2", "--faults", "none", "--clients", "1", "--out", ""]
    result = chaos.Campaign(chaos.parse_arguments(), tmp_path_factory.mktemp("chaos"))
    result.run()
    return result


@pytest.fixture
def replay(campaign):
    """replay(samples) -> the checks that failed; kept=False: where no update has kept a state"""
    from chaos_traffic import Replay

    def run(samples, kept=True):
        campaign.violations.clear()
        Replay(campaign, lambda s: [(version, keep and kept) for version, keep in campaign.history(s)]).run(samples)
        return {v["check"] for v in campaign.violations}

    return run


def a_sample(campaign, **fields):
    import copy

    found = next(s for s in campaign.clients.samples if s.spans and len(s.spans) == 1 and 10 < len(s.tokens) < 300)
    found = copy.deepcopy(found)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_a_campaign_without_faults_succeeds(campaign):
    assert [r["ok"] for r in campaign.attempts] == [True, True] and campaign.replayed["differing"] == 0
    assert campaign.replayed["checked"] > 100
    assert not campaign.violations


def test_a_changed_logprob_or_token_is_found(campaign, replay):
    assert replay([a_sample(campaign)]) == set()
    sample = a_sample(campaign)
    sample.raw[4] *= 1 + 2**-22
    assert replay([sample]) == {"replay"}
    sample = a_sample(campaign)
    sample.tokens[-1] ^= 1
    assert replay([sample]) == {"replay"}
    sample = a_sample(campaign, spans=None)
    assert replay([sample], kept=False) == set(), "a broken stream, whose versions are found"
    sample.raw[4] *= 1 + 2**-22
    assert replay([sample], kept=False) == {"replay"}


def test_a_wrong_span_is_found(campaign, replay):
    sample = a_sample(campaign)
    weights, state, begin, end = sample.spans[0]
    other = (weights[0], (weights[1] + 1) % 3)
    assert replay([a_sample(campaign, spans=[(other, other, begin, end)])]) & {"replay", "spans"}
    assert "spans" in replay([a_sample(campaign, spans=[((9, 9), (0, 0), begin, end)])])
    assert "spans" in replay([a_sample(campaign, spans=[(weights, state, begin, end - 1)])])


def test_a_version_before_the_one_published_is_found(campaign, replay):
    late = max(campaign.attempts, key=lambda r: r["t1"])["t1"] + 1
    early = next(s for s in campaign.clients.samples if s.spans and s.spans[-1][0] < (0, 2))
    assert replay([early]) == set()
    assert "spans" in replay([a_sample(campaign, **vars(early) | {"begin": late, "end": late})])


def test_old_or_new_and_two_versions_are_found(chaos, campaign):
    record = {"from": campaign.generations(), "version": (0, 7), "ok": True, "outcome": "ok"}
    from types import SimpleNamespace

    status = SimpleNamespace(weight_version=SimpleNamespace(epoch=0, step=1))
    campaign.violations.clear()
    campaign.status = lambda worker: (worker.generation, status)
    campaign.clients.call = lambda *arguments, **keywords: []
    campaign.inspect(record)
    assert {v["check"] for v in campaign.violations} == {"two versions"}
    campaign.violations.clear()
    for worker in campaign.workers:
        worker.last_seen = worker.generation, (0, 5)
    campaign.inspect(record | {"ok": False, "outcome": "failed"})
    assert {v["check"] for v in campaign.violations} == {"old or new"}
    campaign.violations.clear()
    for worker in campaign.workers:
        worker.last_seen = worker.generation - 1, (0, 5)  # it was restarted since
    status.weight_version.step = 0
    campaign.inspect(record | {"ok": False, "outcome": "failed"})
    assert not campaign.violations
    campaign.violations.clear()


def test_a_process_number_that_came_round_again_is_nobodys(chaos, campaign):
    import os

    from chaos_report import left_over, shared_memory, start_time

    campaign.violations.clear()
    campaign.pids[os.getpid()] = start_time(os.getpid()) - 1
    left_over(campaign, shared_memory())
    assert not campaign.violations
    campaign.pids[os.getpid()] = start_time(os.getpid())
    left_over(campaign, shared_memory())
    assert {v["check"] for v in campaign.violations} == {"left over"}
    del campaign.pids[os.getpid()]
    campaign.violations.clear()

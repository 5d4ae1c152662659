"""The examples: the plain one is run, the others are imported (they need several ranks) and their walk is tried."""

import importlib
import sys

import pytest
import torch
from fake_weights import FakeWeights

from lockstep.publisher import manifest_of


@pytest.fixture(autouse=True)
def examples(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root / "python" / "examples"))


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.RMSNorm(16)).to(torch.bfloat16)


def test_publish_plain(model):
    worker = FakeWeights(manifest_of(model)).start()
    report = importlib.import_module("publish_plain").publish(model, [worker.address], 3)
    assert [w.version for w in report.workers] == [(0, 3)]
    want = model[0].weight.detach().view(torch.uint8).numpy().tobytes()
    assert worker.weights["0.weight"].tobytes() == want
    worker.server.stop(None)


def test_the_others_walk_the_same_names(model):
    fsdp2 = importlib.import_module("publish_fsdp2")
    zero3 = importlib.import_module("publish_zero3")
    assert "deepspeed" not in sys.modules
    names = [spec.name for spec in manifest_of(model)]
    assert [name for name, _ in fsdp2.gathered(model)] == names == [entry[0] for entry in zero3.manifest(model)]
    model[0].weight.ds_shape = torch.Size([16, 8])
    assert manifest_of(zero3.manifest(model)) == manifest_of(model)

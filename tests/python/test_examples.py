"""The examples: the plain one is run, the others are imported (they need several ranks) and their walk is tried."""

import importlib
import json
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_grpo_learns(start_worker, tiny_model, tmp_path):
    """A third of the default run: the reward is clearly up, and rollout and trainer agree in every step."""
    grpo = importlib.import_module("grpo")
    worker = start_worker(tiny_model, "--numerics", "fp32")
    out = tmp_path / "grpo.json"
    flags = ["--worker", worker.data, "--control", worker.control, "--steps", "16", "--heldout", "100"]
    assert grpo.main([*flags, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    (run,) = record["runs"]
    assert {"commit", "command", "device", "versions", "date"} < set(record)
    assert run["reward_last"] > run["reward_first"] + 0.3, run
    assert run["heldout_last"] > run["heldout_first"] + 0.2, run
    assert run["mismatch_mean"] < 1e-5 and run["mismatch_max"] < 1e-3, run
    grpo.write_json(out, run, "again")
    assert len(json.loads(out.read_text())["runs"]) == 2


def test_grpo_heldout_problems_are_never_trained_on(repo_root):
    grpo = importlib.import_module("grpo")
    trained = set(grpo.Sums(0).draw(3000, heldout=False))
    heldout = set(grpo.Sums(1234).draw(500, heldout=True))
    assert not trained & heldout and len(trained) > 1000 and len(heldout) > 300
    assert all(eval(prompt[8:-2]) == int(answer) for prompt, answer in trained | heldout)

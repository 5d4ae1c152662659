"""The examples: the plain one is run, the others are imported (they need several ranks) and their walk is tried."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import types

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
def test_grpo_learns(start_worker, tiny_model, tmp_path, capsys):
    """A third of the default run: --check is satisfied; what it would find is in test_grpo_check_finds_faults."""
    grpo = importlib.import_module("grpo")
    worker = start_worker(tiny_model, "--numerics", "fp32")
    out = tmp_path / "grpo.json"
    flags = ["--worker", worker.data, "--control", worker.control, "--steps", "16", "--heldout", "100"]
    assert grpo.main([*flags, "--check", "--measurements", str(out)]) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert "step 0 to 15" in shown and "vllm_vs_local_logprob_diff_mean" in shown and "check passed" in shown
    record = json.loads(out.read_text())
    (run,) = record["runs"]
    assert {"commit", "command", "device", "versions", "date"} < set(record)
    assert run["reward_last"] > run["reward_first"] + 0.3, run
    assert run["heldout_last"] > run["heldout_first"] + 0.2, run
    assert run["mismatch_mean"] < 1e-5 and run["mismatch_max"] < 1e-3, run

    grpo.write_measurements(out, {**run, "seed": 1}, "another")
    grpo.write_measurements(out, {**run, "steps": 16}, "again")  # the same settings: replaced
    record = json.loads(out.read_text())
    assert [r["seed"] for r in record["runs"]] == [1, 0] and record["command"] == "another; again"
    out.write_text(json.dumps(record | {"commit": "0" * 40}))
    with pytest.raises(SystemExit, match="runs of commit 0000"):
        grpo.main([*flags, "--measurements", str(out)])


def test_grpo_check_finds_faults():
    grpo = importlib.import_module("grpo")
    good = {"reward_first": 0.1, "reward_last": 0.9, "heldout_first": 0.1, "heldout_last": 0.9}
    good |= {"mismatch_mean": 1e-6, "mismatch_max": 1e-5}
    layout = types.SimpleNamespace(broken=[])
    report = types.SimpleNamespace(layouts=[layout], findings=[])
    assert grpo.faults(good, report) == []
    assert "reward: 0.100 to 0.300, want a rise of 0.3" in grpo.faults({**good, "reward_last": 0.3}, report)
    assert len(grpo.faults({**good, "heldout_last": float("nan"), "mismatch_max": 1.0}, report)) == 2
    layout.broken, report.findings = ["mean 0.1"], ["stale weights"]
    assert [fault.split(": ")[1] for fault in grpo.faults(good, report)] == ["mean 0.1", "stale weights"]


STAND_IN_BOARD = """
import pathlib, sys, types
class SummaryWriter:  # stands in for torch.utils.tensorboard's, which needs the package tensorboard
    def __init__(self, directory):
        self.file = pathlib.Path(directory).open("w")
    def add_scalar(self, name, value, step):
        print(name, step, file=self.file, flush=True)
    def close(self):
        print("closed", file=self.file, flush=True)
sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
sys.path.insert(0, sys.argv.pop(1))
import grpo
sys.exit(grpo.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_grpo_cleans_up_on_signals(repo_root, build_dir, tiny_model, tmp_path, number):
    """The worker that it had started is gone, and TensorBoard's writer is closed."""
    binary, board = tmp_path / "worker", tmp_path / "board"
    binary.write_text(f'#!/bin/sh\necho $$ >{tmp_path}/pid\nexec {build_dir}/bin/lockstep-worker "$@"\n')
    binary.chmod(0o755)
    command = [sys.executable, "-c", STAND_IN_BOARD, str(repo_root / "python" / "examples"), "--binary", str(binary)]
    command += ["--model", str(tiny_model), "--heldout", "8", "--prompts", "4", "--tensorboard", str(board)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(300, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("step   1"):
                break
        worker = int((tmp_path / "pid").read_text())
        os.kill(worker, 0)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, error
    assert f"ended by {number.name}" in error and "Traceback" not in error and "killed" not in error, error
    assert board.read_text().splitlines()[-1] == "closed" and "reward 0" in board.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_grpo_heldout_problems_are_never_trained_on(repo_root):
    grpo = importlib.import_module("grpo")
    trained = set(grpo.Sums(0).draw(3000, heldout=False))
    heldout = set(grpo.Sums(1234).draw(500, heldout=True))
    assert not trained & heldout and len(trained) > 1000 and len(heldout) > 300
    assert all(eval(prompt[8:-2]) == int(answer) for prompt, answer in trained | heldout)

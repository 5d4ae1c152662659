"""lockstep.parity against a real worker: agreement, and each fault by its name."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fake_weights import FakeWeights

from lockstep import InvalidRequest, RolloutClient, SamplingParams, parity, parity_report, text
from lockstep.hf import TransformersTrainer
from lockstep.publisher import manifest_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def fp32_worker(start_worker, tiny_model):
    return start_worker(tiny_model, "--numerics", "fp32")


@pytest.fixture(scope="module")
def client(fp32_worker):
    with RolloutClient(fp32_worker.data) as client:
        yield client


@pytest.fixture(scope="module")
def model(tiny_model):
    return TransformersTrainer(tiny_model, device="cpu", dtype="float32").model


def sampling(**options):
    return SamplingParams(**({"max_tokens": 60, "ignore_eos": True, "seed": 1} | options))


def test_fp32_agrees(client, model, tiny_model):
    tokenizer = text.load_tokenizer(tiny_model)
    strict = parity.Thresholds(mean=1e-5, max=1e-4)
    report = parity.check(
        client, TransformersTrainer(model), sampling=sampling(), thresholds=strict, tokenizer=tokenizer
    )
    metrics = report.layouts[0].metrics
    assert report.passed and report.exit_code == 0 and report.findings == [] and report.profile == "fp32", str(report)
    assert metrics["tokens"] == 16 * 60 and metrics["effective_sample_size"] > 0.999999
    assert (
        sum(row[1] for row in report.layouts[0].by_position) == 960 == sum(row[1] for row in report.layouts[0].by_type)
    )
    assert len(report.layouts[0].by_type) > 2 and "vllm_vs_local_logprob_diff_mean" in str(report)
    assert "passed" in parity_report.as_html(report) and json.dumps(parity_report.as_json(report))
    bits = parity.check(
        client, TransformersTrainer(model), sampling=sampling(), thresholds=parity.Thresholds(bits=True)
    )
    assert not bits.passed and bits.exit_code == 1, "on a CPU the trainer agrees to a tolerance, not in bits"


def test_a_callable_is_a_trainer_and_a_wrong_one_is_caught(client):
    scores = lambda tokens: client.score([tokens])[0]  # noqa: E731
    report = parity.check(client, scores, sampling=sampling(), thresholds=parity.Thresholds(bits=True))
    assert report.passed and report.layouts[0].metrics["bit_equal"] == 1 and not report.layouts[0].worst
    late = lambda tokens: np.roll(scores(tokens), 1)  # noqa: E731  # off by one
    report = parity.check(client, late, sampling=sampling())
    assert not report.passed and len(report.layouts[0].worst) == 10
    with pytest.raises(ValueError, match="want .*-1|trainer: "):
        parity.check(client, lambda tokens: np.zeros(len(tokens)), sampling=sampling())
    with pytest.raises(InvalidRequest, match="packed"):
        parity.check(client, scores, layouts=["packed"])


def test_temperature_on_one_side(client, model):
    hot = sampling(temperature=0.6)
    report = parity.check(client, TransformersTrainer(model), sampling=hot)
    assert not report.passed and len(report.findings) == 1
    assert report.findings[0].startswith("temperature on one side") and "by 0.6" in report.findings[0]
    assert parity.check(client, TransformersTrainer(model, temperature=0.6), sampling=hot).passed


def test_raw_against_processed(client):
    filtered = sampling(top_k=5)
    rollouts = client.generate([[7, 8]], filtered, logprobs=parity.KINDS)
    values = client.score(rollouts.sequences)[0].copy()
    values[-60:] = rollouts[0].logprobs_by_kind["processed"]
    report = parity.check(client, lambda tokens: values, prompts=[[7, 8]], sampling=filtered)
    assert report.findings[0].startswith("raw against processed")


def test_bf16_log_softmax(client, model):
    exact = TransformersTrainer(model)
    rounded = lambda tokens: torch.from_numpy(exact(tokens)).bfloat16().float().numpy()  # noqa: E731
    report = parity.check(client, rounded, sampling=sampling())
    assert [f.split(":")[0] for f in report.findings] == ["bf16 log_softmax"]


def test_layouts(client, model):
    """The stock model leaks state across packed documents, and says nothing."""
    layouts = ("unpadded", "packed", "left_padded")
    report = parity.check(client, TransformersTrainer(model), sampling=sampling(), layouts=layouts)
    by_name = {result.layout: result for result in report.layouts}
    assert not by_name["unpadded"].broken and by_name["packed"].broken and not report.passed
    assert any(f.startswith("packed") and "state leaks across packed documents" in f for f in report.findings)
    assert any(f.startswith("left_padded") for f in report.findings)


def test_a_shifted_chunk_grid_is_named():
    alone = [np.full(9, -1.0, np.float32) for _ in range(4)]
    values = [alone[0], alone[1] + np.float32(0.01), alone[2], alone[3] - np.float32(0.02)]
    (finding,) = parity.layout_fault("left_padded", [0, 5, 64, 100], values, alone)
    assert "left padding shifts the chunk grid" in finding and "18 of 36" in finding
    assert parity.layout_fault("left_padded", [0, 5, 64, 100], alone, alone) == []


def test_stale_weights(model):
    trainer = TransformersTrainer(model)
    specs = manifest_of([(n, "bfloat16", t.shape) for n, t in trainer.tensors().items()])
    fake = FakeWeights(specs).start()
    for name, tensor in trainer.tensors().items():
        fake.weights[name] = tensor.bfloat16().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
    assert parity.stale_weights(trainer, fake.address) == []
    fake.weights["lm_head.weight"][0] ^= 1
    (finding,) = parity.stale_weights(trainer, fake.address)
    assert finding.startswith("stale weights: 1 of") and "lm_head.weight" in finding
    fake.server.stop(None)


def cli(repo_root, *arguments):
    command = [sys.executable, "-m", "lockstep", "parity", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root / "python", capture_output=True, text=True, timeout=300)


def test_cli(repo_root, fp32_worker, tiny_model, tmp_path):
    common = ("--model", tiny_model, "--dtype", "float32", "--device", "cpu", "--max_tokens", "24", "--prompts", "4")
    good = cli(
        repo_root, "--worker", fp32_worker.data, *common, "--html", tmp_path / "r.html", "--json", tmp_path / "r.json"
    )
    assert good.returncode == 0 and good.stdout.endswith("passed\n"), good.stderr
    page = (tmp_path / "r.html").read_text()
    assert "<svg" in page and "src=" not in page and "href=" not in page
    assert json.loads((tmp_path / "r.json").read_text())["layouts"][0]["metrics"]["tokens"] == 96
    bad = cli(repo_root, "--worker", fp32_worker.data, *common, "--temperature", "0.5", "--trainer_temperature", "1")
    assert bad.returncode == 1 and "FOUND: temperature on one side" in bad.stdout
    none = cli(repo_root, "--worker", fp32_worker.data, "--model", tmp_path / "nothing")
    assert none.returncode == 2


def test_png(client, tmp_path):
    pytest.importorskip("matplotlib")
    report = parity.check(client, lambda tokens: client.score([tokens])[0], sampling=sampling(), count=2)
    parity_report.write_png(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"

"""check_trainer's verdicts, and all of it on the tiny checkpoint."""

import json
import types

import check_trainer
import pytest
import torch
from parity_metrics import Difference

EQUAL = Difference(tokens=10)
OFF = Difference(tokens=10, differing=1, total=0.3, max=0.3)


def test_aligned_promises_every_bit_on_a_gpu():
    broken = check_trainer.broken_parity
    assert broken("aligned", EQUAL, "cuda", "bfloat16") == ""
    assert "1 of 10 tokens" in broken("aligned", OFF, "cuda", "bfloat16")
    assert broken("stock", OFF, "cuda", "bfloat16") == ""
    assert "NaN" in broken("stock", Difference(tokens=10, nan=1), "cuda", "bfloat16")
    assert "mean" in broken("aligned", OFF, "cpu", "float32")
    assert broken("aligned", Difference(tokens=10, differing=10, total=1e-5), "cpu", "float32") == ""


def test_gradients_may_be_as_noisy_as_stock_is():
    def broken(median, p99, device="cuda"):
        row = {"comparison": "aligned", "median": median, "p99": p99}
        return check_trainer.broken_gradients(row, NOISES, 1.5, device, "float32")

    NOISES = [{"median": 0.1, "p99": 0.2}, {"median": 0.05, "p99": 0.4}]
    assert broken(0.15, 0.6) == ""
    assert "median" in broken(0.16, 0.6) and "p99" in broken(0.1, 0.61) and "p99" in broken(0.1, float("inf"))
    assert "99th percentile" in broken(0.0, 0.01, "cpu") and broken(0.0, 1e-4, "cpu") == ""


def test_spread_of_errors():
    found = check_trainer.spread_of({f"p{i}": i / 100 for i in range(100)} | {"bad": float("nan")})
    assert found["parameters"] == 101 and found["median"] == 0.5
    assert found["p99"] == 0.99 and found["max"] == float("inf") and found["worst"] == "bad"


def test_gradients_of_several_batches_are_their_means():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    batches = [check_trainer.Batch({"x": torch.randn(5, 4)}, lambda logits: logits.square().mean()) for _ in range(2)]

    linear = torch.nn.functional.linear
    model.forward = lambda x: types.SimpleNamespace(logits=linear(x, model.weight, model.bias))
    reference = {}
    check_trainer.backward(model, batches, lambda name, gradient: reference.update({name: gradient.clone()}))
    (sum(b.loss(model(**b.inputs).logits) for b in batches) / 2).backward()
    torch.testing.assert_close(reference["weight"], model.weight.grad)
    model.zero_grad(set_to_none=True)
    assert max(check_trainer.relative_errors(model, batches, reference).values()) < 1e-6
    assert model.weight.grad is None, "gradients are dropped as they come"
    assert min(check_trainer.relative_errors(model, batches[:1], reference).values()) > 0.01
    with pytest.raises(RuntimeError, match="no gradient for 1"):
        check_trainer.relative_errors(model, batches, reference | {"other": torch.zeros(1)})


def test_all_of_it(build_dir, tiny_model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(check_trainer.ROOT / "python"))
    out = tmp_path / "trainer.json"
    flags = ["--model", str(tiny_model), "--binary", str(build_dir / "bin" / "lockstep-worker"), "--device", "cpu"]
    flags += ["--worker_flags", "--numerics fp32", "--lengths", "70,65,12,9", "--tokens", "150", "--json", str(out)]
    assert check_trainer.main([*flags, "--batch", "2", "--batch_length", "20", "--repeats", "1"]) == 0
    found = json.loads(out.read_text())
    rows = {(row["layout"], row["mode"]): row for row in found["parity"]}
    assert set(rows) == {(layout, mode) for layout in check_trainer.LAYOUTS for mode in check_trainer.MODES}
    assert all(row["tokens"] >= 150 for row in rows.values())
    assert "state leaks" in rows["packed", "stock"]["found"][0] and rows["packed", "stock"]["mean"] > 0.1
    assert max(rows[layout, "aligned"]["mean"] for layout in check_trainer.LAYOUTS) < 1e-5
    assert [row["mode"] for row in found["gradients"]] == ["stock", "stock", "aligned", "aligned"]
    assert len(found["cost"]) == 4 and all(row["ratio"] > 0 for row in found["cost"])
    assert {"commit", "command", "device", "versions", "date"} < set(found)

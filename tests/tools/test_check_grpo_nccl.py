"""check_grpo_nccl's verdicts, and a few steps of it with tests/fake_nccl in NCCL's place."""

import json

import check_grpo_nccl
import check_weights_nccl
import pytest


def steps(**changed):
    rows = [
        {"step": i, "reward": i / 50, "tokens": 100, "bit_equal": 1.0, "mismatch_mean": 0.0, "mismatch_max": 0.0}
        for i in range(50)
    ]
    rows[7] |= changed
    return rows


def test_promises():
    broken = check_grpo_nccl.broken_promises
    assert check_grpo_nccl.rewards_of(steps()) == pytest.approx((0.09, 0.89))
    assert broken(steps(), 0.3, True) == [] and broken(steps(), 0.3, False) == []
    (text,) = broken(steps(bit_equal=0.99, mismatch_mean=1e-6, mismatch_max=1e-4), 0.3, True)
    assert text.startswith("step 7: 99.0000% of 100 tokens equal in bits")
    assert broken(steps(bit_equal=0.99, mismatch_mean=1e-6, mismatch_max=1e-4), 0.3, False) == []
    assert "step 7" in broken(steps(mismatch_mean=float("nan")), 0.3, False)[0]
    assert "reward" in broken(steps(), 0.9, True)[0]


def test_a_few_steps(build_dir, tmp_path):
    out = tmp_path / "grpo.json"
    flags = ["--binary", str(build_dir / "bin" / "lockstep-worker"), "--worker_flags", "--numerics fp32"]
    flags += ["--nccl_library", str(build_dir / "lib" / "libfake_nccl.so"), "--device", "cpu"]
    assert check_grpo_nccl.main([*flags, "--steps", "2", "--heldout", "4", "--rise", "-1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 and found["tokens"] > 0 and found["sync_ms"]["max"] >= found["sync_ms"]["median"] > 0
    assert {"commit", "command", "device", "versions", "date"} < set(found)


def test_one_gpu():
    arguments = check_grpo_nccl.parse_arguments(["--binary", "worker", "--one_gpu"])
    assert arguments.worker_flags == "--backend cuda --numerics hf --cuda_device 0 --memory_fraction 0.4"
    assert "--cuda_device 1" in check_grpo_nccl.parse_arguments(["--binary", "worker"]).worker_flags
    assert check_grpo_nccl.one_gpu.environment("a")["NCCL_HOSTID"] == "a"


def test_memory_of_the_dead():
    assert not check_weights_nccl.leaked([1000, 1900, 1000 + check_weights_nccl.LEAK_MIB])
    assert check_weights_nccl.leaked([1000, 1000, 1001 + check_weights_nccl.LEAK_MIB])

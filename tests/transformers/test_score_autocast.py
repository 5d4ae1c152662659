"""Score under --numerics hf-autocast against transformers with fp32 weights under autocast to bf16, on a CPU.

A CPU's autocast gives every tensor the dtype that a GPU's does (docs/numerics.md), but hf-autocast's sums are ordered as a
GPU's and its Gated DeltaNet casts as fla's kernels do. So not bits: with `own` = |transformers autocast - transformers
fp32|, means over the tokens, Lockstep is at most 1.15 times `own` from fp32, no less accurate, and at most sqrt(2) times
`own` from autocast: what two results as accurate lie apart if nothing but size ties their errors. What tells the casts
apart is the residual stream: under `hf`, which rounds it, the same tokens are further from fp32.
"""

import math

import configs
import pytest
import torch
from scoring import score_all

LENGTHS = [2, 63, 64, 65, 128, 129, 300, 700]


def logprobs(worker, sequences):
    return torch.cat(score_all(worker, sequences))


def distance(a, b):
    return float((a - b).abs().mean())


@pytest.mark.parametrize("checkpoint", configs.CHECKPOINTS, ids=lambda c: c.name)
def test_random_checkpoint(checkpoint, start_worker, tmp_path):
    directory = tmp_path / checkpoint.name
    configs.write(checkpoint, directory)
    sequences = configs.random_sequences(checkpoint.config["vocab_size"], LENGTHS, seed=3)
    model = configs.load_reference(checkpoint, directory, torch.float32)
    fp32 = torch.cat(configs.reference_logprobs(model, sequences))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = torch.cat(configs.reference_logprobs(model, sequences))
    found = {}
    for numerics in ("hf-autocast", "hf"):
        worker = start_worker(directory, "--numerics", numerics)
        found[numerics] = logprobs(worker, sequences)
        worker.stop()
    own = distance(autocast, fp32)
    mismatch, error = distance(found["hf-autocast"], autocast), distance(found["hf-autocast"], fp32)
    rounded = distance(found["hf"], fp32)
    print(
        f"{checkpoint.name}: mean |d logprob|: transformers autocast to fp32 {own:.5f}; Lockstep to transformers autocast "
        f"{mismatch:.5f} (ratio {mismatch / own:.3f}), to fp32 {error:.5f} (ratio {error / own:.3f}); hf to fp32 {rounded:.5f}"
    )
    assert own > 1e-4, "autocast and fp32 hardly differ: there is no scale to measure by"
    assert mismatch <= math.sqrt(2) * own
    assert error <= 1.15 * own
    assert rounded > error, "a rounded residual stream is no worse: the comparison lost its point"
